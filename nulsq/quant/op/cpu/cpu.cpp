// The CPU form of the fake-quantize operation: one pass over memory forward, one backward with all sums in it; behind a
// batch norm a second one for dx, which the sums have part in.
//
// oracle.py defines what is computed; cpu.py compiles this file and calls it. Written with the vector types that GCC
// and Clang share: one text for AVX2, AVX-512 and NEON. What makes it quick:
//
//   kinds.h   what is done with a vector
//   lines.h   how memory is gone over, and the batch norm on the way
//   order     pieces of PIECE elements are summed in the type of computation, the pieces in double and in order: the
//             same numbers for any number of threads

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kinds.h"
#include "lanes.h"
#include "lines.h"
#include "table.h"

namespace {

// The ReLU before a kind that does not do its work, where there is one.
template <class Kind, class C> struct BehindRelu {
    Real<C> floor;

    explicit BehindRelu(const Rule& rule) {                    // nothing is below a NaN
        floor = all<C>(rule.relu ? C(0) : std::numeric_limits<C>::quiet_NaN());
    }
    INLINED Real<C> level(const Kind& kind, Real<C> x) const {
        return kind.level(Kind::RELU ? x : x <= floor ? floor : x);
    }
    template <class K> INLINED Real<C> gradient(K& kind, Real<C> x, Real<C> dy) const {
        if constexpr (Kind::RELU) return kind.gradient(x, dy);
        x = x <= floor ? floor : x;
        const Real<C> dx = kind.gradient(x, dy);
        return x == floor ? Real<C>{} : dx;
    }
};

// y (FORWARD) or dx and the sums of one piece, the elements from `start` on.
template <bool FORWARD, class Kind, class S, class C>
void piece(const Rule& rule, const Table<C>& table, const Lines<C>& lines, int64_t start, int64_t count, const S* x,
           const S* dy, S* out, double* total, double* line_total) {
    constexpr bool COPIED = !FORWARD && Kind::SMALL;           // a walk's own sums lie in registers
    using Own = std::conditional_t<COPIED, Kind, Kind&>;
    Kind kind(rule, table);
    const BehindRelu<Kind, C> behind(rule);
    auto found = [=](auto& kind, Real<C> at, const S* dy) INLINED {  // y or dx
        if constexpr (FORWARD) return behind.level(kind, at);
        else return behind.gradient(kind, at, load(dy));
    };
    if (!lines.features) {
        auto go = [&](int64_t i, const Walk& walk) {
            Own own = kind;
            auto step = [&](const S* x, const S* dy, S* out) INLINED { store(out, found(own, load(x), dy)); };
            vectors<FORWARD, C>(x + i, along(dy, i), out + i, walk, step);
            if constexpr (COPIED) kind = own;
        };
        const int64_t rest = count % WIDTH<C>, full = count - rest;
        go(0, Walk{count / WIDTH<C>, WIDTH<C>, WIDTH<C>, AHEAD});
        if (rest) go(full, Walk{1, WIDTH<C>, rest, AHEAD});
    } else {
        lines.stretches(start, count, [&](int64_t i, const Walk& walk, int64_t channel) {
            const Real<C> center = lines.of(lines.center, channel), scale = lines.of(lines.scale, channel),
                          shift = lines.of(lines.shift, channel) - center * scale;
            Real<C> turned{}, moved{};                         // what the lines' scale and shift get
            Own own = kind;
            auto step = [&](const S* x, const S* dy, S* out) INLINED {
                const Real<C> taken = load(x), given = found(own, taken * scale + shift, dy);
                if constexpr (FORWARD) store(out, given);
                else {
                    turned += given * (taken - center);
                    moved += given;
                    if (out) store(out, given * scale);
                }
            };
            vectors<FORWARD, C>(x + i, along(dy, i), along(out, i), walk, step);
            if constexpr (!FORWARD) {
                if constexpr (COPIED) kind = own;
                lines.add(line_total, channel, turned);
                lines.add(line_total + lines.features, channel, moved);
            }
        });
    }
    if constexpr (!FORWARD) kind.add_to(total);
}

// dx of one piece, with what goes through the batch's own statistics, once all sums are known.
template <class Kind, class S, class C>
void passed_on(const Rule& rule, const Table<C>& table, const Lines<C>& lines, int64_t start, int64_t count,
               const S* x, const S* dy, S* out) {
    const Kind kind(rule, table);
    const BehindRelu<Kind, C> behind(rule);
    lines.stretches(start, count, [&](int64_t i, const Walk& walk, int64_t channel) {
        const Real<C> center = lines.of(lines.center, channel), scale = lines.of(lines.scale, channel),
                      shift = lines.of(lines.shift, channel) - center * scale,
                      slope = lines.of(lines.slope, channel),
                      rise = lines.of(lines.rise, channel);
        auto step = [&](const S* x, const S* dy, S* out) INLINED {
            const Real<C> taken = load(x);
            const Real<C> dx = behind.gradient(kind, taken * scale + shift, load(dy)) * scale;
            store(out, dx + ((taken - center) * slope + rise));
        };
        vectors<false, C>(x + i, dy + i, out + i, walk, step);
    });
}

template <class S, class C, bool FROM_ZERO> auto choose_ends(const Rule& rule) {
    return rule.uniform ? passed_on<Ends<C, true, FROM_ZERO>, S, C> : passed_on<Ends<C, false, FROM_ZERO>, S, C>;
}

template <bool FORWARD, class S, class C, int COUNT, bool FROM_ZERO> auto choose_kind(const Rule& rule) {
    if constexpr (!FORWARD) {
        if (rule.reduction == PER_GAP) {
            if constexpr (COUNT == 0 || COUNT > MASKED<C>) return piece<FORWARD, Scattered<C, COUNT, PER_GAP>, S, C>;
            else {
                if constexpr (COUNT > 3)
                    if (rule.low == 0) return piece<FORWARD, Packed<C, COUNT, FROM_ZERO>, S, C>;
                return piece<FORWARD, Masked<C, COUNT, COUNT, FROM_ZERO>, S, C>;
            }
        }
        if (rule.reduction == PER_CELL) return piece<FORWARD, Scattered<C, COUNT, PER_CELL>, S, C>;
    }
    return piece<FORWARD, Masked<C, COUNT, 1, FROM_ZERO>, S, C>;
}

template <bool FORWARD, class S, class C, bool FROM_ZERO> auto choose_range(const Rule& rule) {
    if (rule.uniform) return piece<FORWARD, Uniform<C, FROM_ZERO>, S, C>;
    switch (rule.thresholds) {                                 // all thresholds of 1, 2, 3 and 4 bits in registers
        case 1: return choose_kind<FORWARD, S, C, 1, FROM_ZERO>(rule);
        case 3: return choose_kind<FORWARD, S, C, 3, FROM_ZERO>(rule);
        case 7: return choose_kind<FORWARD, S, C, 7, FROM_ZERO>(rule);
        case 15: return choose_kind<FORWARD, S, C, 15, FROM_ZERO>(rule);
        default: return choose_kind<FORWARD, S, C, 0, FROM_ZERO>(rule);
    }
}

template <bool FORWARD, class S, class C> auto choose(const Rule& rule, bool from_zero) {
    return from_zero ? choose_range<FORWARD, S, C, true>(rule) : choose_range<FORWARD, S, C, false>(rule);
}

template <class S, class C> void run(const Call& call) {
    const Rule& rule = call.rule;
    Lines<C> lines(call);
    const int64_t channels = call.channels, elements = call.elements, pieces = lines.pieces(elements);
    const int slots = call.dy ? slots_of(rule) : 0, line_slots = call.dy ? 2 * call.features : 0;
    std::vector<Table<C>> tables(channels);
    bool from_zero = rule.relu && (!rule.uniform || rule.low + rule.shift == 0);
    for (int64_t c = 0; c < channels; c++) {
        tables[c].read(rule, (const C*)call.gaps + c * call.gap_count,
                       (const C*)call.levels + c * (rule.thresholds + 1),
                       (const C*)call.thresholds + c * rule.thresholds, call.ties_up);
        from_zero = from_zero && (rule.uniform || tables[c].levels[0] == 0);
        if (by_halves<C>(tables[c].count)) tables[c].sort_into_halves();
        if (tables[c].count > CHAIN && elements > 4 * Table<C>::BUCKETS) tables[c].sort_into_buckets();
    }
    std::vector<double> partial(channels * pieces * slots, 0.0), line_partial(pieces * line_slots, 0.0);
    const auto work = call.dy ? choose<false, S, C>(rule, from_zero) : choose<true, S, C>(rule, from_zero);
    const S *x = (const S*)call.x, *dy = (const S*)call.dy;
    S* out = (S*)call.out;
    const bool twice = call.dy && call.inverse;  // dx needs the sums of the first pass
    by_pieces(call, lines, [&](int64_t task, int64_t start, int64_t count) {
        const int64_t c = task / pieces, at = c * elements + start;
        work(rule, tables[c], lines, start, count, x + at, along(dy, at), twice ? nullptr : out + at,
             partial.data() + task * slots, line_partial.data() + task * line_slots);
    });
    for (int64_t s = 0; s < line_slots; s++) {
        double total = 0;
        for (int64_t piece = 0; piece < pieces; piece++) total += line_partial[piece * line_slots + s];
        if (s < call.features) ((C*)call.dscale)[s] = total;
        else ((C*)call.dshift)[s - call.features] = total;
    }
    if (twice) {
        const auto rest = from_zero ? choose_ends<S, C, true>(rule) : choose_ends<S, C, false>(rule);
        lines.pass_on(call);
        by_pieces(call, lines, [&](int64_t, int64_t start, int64_t count) {
            rest(rule, tables[0], lines, start, count, x + start, dy + start, out + start);
        });
    }
    if (!slots) return;

    C *dgaps = (C*)call.dgaps, *doffset = (C*)call.doffset, *dslope = (C*)call.dslope;
    const int gap_count = call.gap_count;
    const C* gaps = (const C*)call.gaps;
    const int cells = rule.thresholds + rule.segments;
    const int last = rule.reduction == TOTAL ? 2 : rule.reduction == PER_GAP ? rule.thresholds + 1 : cells + 1;
    for (int64_t c = 0; c < channels; c++) {
        std::vector<double> total(slots, 0.0);
        for (int64_t piece = 0; piece < pieces; piece++)
            for (int s = 0; s < slots; s++) total[s] += partial[(c * pieces + piece) * slots + s];
        const double below = total[0], above = total[last];
        if (rule.reduction == PER_GAP) {                       // an end is the sum of the gaps from zero to there
            for (int k = 0; k < gap_count; k++)
                dgaps[c * gap_count + k] = total[1 + k] / gaps[c * gap_count + k] + (k < -rule.low ? -below : above);
            continue;
        }
        if (rule.uniform) {                                    // in steps already
            dgaps[c] = total[1] + total[2];
            continue;
        }
        const double unit = gaps[c];
        dgaps[c] = (tables[c].levels[0] * below + tables[c].levels[rule.thresholds] * above) / unit;
        if (rule.reduction == TOTAL) dgaps[c] += total[1] / unit;
        else for (int m = 0; m < cells; m++) {
            doffset[c * cells + m] = total[1 + m];
            dslope[c * cells + m] = total[cells + 3 + m];
        }
    }
}

}  // namespace

// by what x and all that has its shape are stored in
#define FOR_EACH_STORAGE(name, function)                             \
    extern "C" void name(const Call* call) {                         \
        if (call->storage == 0) function<float, float>(*call);         \
        else if (call->storage == 1) function<BFloat16, float>(*call); \
        else function<double, double>(*call);                          \
    }
FOR_EACH_STORAGE(nulsq_run, run)
FOR_EACH_STORAGE(nulsq_moments, moments)
