// SIMD vectors of float and double for cpu.cpp, in the vector types of GCC and Clang: one source for AVX2, AVX-512 and
// NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

// For functions that a loop calls for every vector. Without inlining their sums would be in memory, where a store could
// change them.
#define INLINED __attribute__((always_inline))

#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif

namespace {

struct BFloat16 { uint16_t bits; };

template <class C> struct Types;
template <> struct Types<float> {
    typedef float Real __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr float ROUNDER = 12582912.f;               // 1.5 * 2^23: adding it rounds the fraction away
};
template <> struct Types<double> {
    typedef double Real __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr double ROUNDER = 6755399441055744.0;      // 1.5 * 2^52
};

template <class C> using Real = typename Types<C>::Real;
template <class C> using Int = typename Types<C>::Int;
template <class C> using Integer = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
template <class C> constexpr int WIDTH = VECTOR_BYTES / sizeof(C);

template <class C> inline Real<C> all(C value) { return value - Real<C>{}; }
template <class C> inline Real<C> where(Int<C> mask, Real<C> value) { return mask ? value : Real<C>{}; }
// Use one comparison for each sum: AVX-512 adds under the mask of a comparison. Combining masks costs more than that.
template <class V, class M> inline void add_where(V& sum, M mask, V value) { sum = mask ? sum + value : sum; }

#ifdef __AVX512F__
#define INSTRUCTION(name) _mm512_##name
#elif defined(__AVX2__)
#define INSTRUCTION(name) _mm256_##name
#endif
#ifdef INSTRUCTION                                             // b if one of them is NaN
inline Real<float> larger(Real<float> a, Real<float> b) { return INSTRUCTION(max_ps)(a, b); }
inline Real<double> larger(Real<double> a, Real<double> b) { return INSTRUCTION(max_pd)(a, b); }
inline Real<float> smaller(Real<float> a, Real<float> b) { return INSTRUCTION(min_ps)(a, b); }
inline Real<double> smaller(Real<double> a, Real<double> b) { return INSTRUCTION(min_pd)(a, b); }
#else
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }
template <class V> inline V smaller(V a, V b) { return a < b ? a : b; }
#endif

template <class V, class E> inline V load_as(const E* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
inline Real<float> load(const float* from) { return load_as<Real<float>>(from); }
inline Real<double> load(const double* from) { return load_as<Real<double>>(from); }
inline Int<float> load(const int32_t* from) { return load_as<Int<float>>(from); }
inline Int<double> load(const int64_t* from) { return load_as<Int<double>>(from); }
template <class V, class E> inline void store(E* to, V v) { memcpy(to, &v, sizeof v); }

typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(VECTOR_BYTES / 2)));

inline Real<float> load(const BFloat16* from) {
    const HalfBits bits = load_as<HalfBits>(from);
#ifdef __AVX512F__
    return (Real<float>)((Bits)_mm512_cvtepu16_epi32((__m256i)bits) << 16);  // GCC generates four instructions
#elif defined(__AVX2__)
    return (Real<float>)((Bits)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
    return (Real<float>)(__builtin_convertvector(bits, Bits) << 16);
#endif
}
#ifdef __AVX512BF16__
inline void store(BFloat16* to, Real<float> v) { store(to, _mm512_cvtneps_pbh((__m512)v)); }  // 1e-38 becomes zero
#else
inline void store(BFloat16* to, Real<float> v) {               // to nearest, ties to even; NaN stays NaN
    const Bits bits = (Bits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store(to, __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, HalfBits));
}
#endif

// A vector as a table of PICKS values, indexed by the low bits of each lane. One instruction; PICKS = 0: there is none.
template <class C> constexpr int PICKS = 0;
template <class C> Real<C> pick(Real<C> table, Int<C> index);
#ifdef __AVX512F__
template <> constexpr int PICKS<float> = 16;
template <> inline Real<float> pick<float>(Real<float> table, Int<float> index) {
    return (Real<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
}
#elif defined(__AVX2__)
template <> constexpr int PICKS<float> = 8;
template <> inline Real<float> pick<float>(Real<float> table, Int<float> index) {
    return (Real<float>)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
}
#endif

// pack: moves the lanes of a mask to the front, the rest is undefined. lanes_in: how many lanes a mask has.
template <class C> inline Real<C> pack(Real<C> v, Int<C> mask) {
    C from[WIDTH<C>], to[WIDTH<C>];
    Integer<C> kept[WIDTH<C>];
    store(from, v);
    store(kept, mask);
    for (int j = 0, n = 0; j < WIDTH<C>; n -= int(kept[j++])) to[n] = from[j];
    return load(to);
}
template <class C> inline int lanes_in(Int<C> mask) {
    int n = 0;
    for (int j = 0; j < WIDTH<C>; j++) n -= int(mask[j]);
    return n;
}
#ifdef __AVX512F__
inline __mmask16 bits_of(Int<float> mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask); }
template <> inline Real<float> pack<float>(Real<float> v, Int<float> mask) {
    return (Real<float>)_mm512_maskz_compress_ps(bits_of(mask), (__m512)v);
}
#elif defined(__AVX2__)
struct LaneOrder {                                               // for each bit mask: its lanes, in order
    alignas(32) int32_t lanes[256][8];
    constexpr LaneOrder() : lanes() {
        for (int mask = 0; mask < 256; mask++)
            for (int j = 0, n = 0; j < 8; j++)
                if (mask >> j & 1) lanes[mask][n++] = j;
    }
};
constexpr LaneOrder LANE_ORDER;
inline unsigned bits_of(Int<float> mask) { return unsigned(_mm256_movemask_ps((__m256)mask)); }
template <> inline Real<float> pack<float>(Real<float> v, Int<float> mask) {
    return pick<float>(v, load(LANE_ORDER.lanes[bits_of(mask)]));
}
#endif
#ifdef __AVX2__                                                // also defined with AVX-512
template <> inline int lanes_in<float>(Int<float> mask) { return __builtin_popcount(bits_of(mask)); }
#endif

template <class C> inline Real<C> clamp(Real<C> v, C low, C high) {    // NaN stays NaN
    return smaller(all<C>(high), larger(all<C>(low), v));
}
template <class C> inline Real<C> round_half_even(Real<C> v) { return v + Types<C>::ROUNDER - Types<C>::ROUNDER; }

}  // namespace
