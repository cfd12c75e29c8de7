// The CPU kernel of the fake-quantize operation. Forward is one pass over memory. Backward is one pass that also adds
// up all sums; after a batch norm in training a second pass follows, because the input gradient depends on the sums.
//
// reference.py defines what is computed. build.py compiles this file, kernel.py calls it.
//
//   vector.h      SIMD vectors: one source for AVX2, AVX-512 and NEON
//   rules.h       Rule and Table: what a quantizer declares
//   quantizers.h  level and gradient of one vector, for each type of quantizer
//   traversal.h   the order in which memory is visited, and the batch norm before the quantizer
//
// Sums are added up in the computation type within pieces of PIECE elements. The pieces are then added in double and in
// order, so the result does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "quantizers.h"
#include "rules.h"
#include "traversal.h"
#include "vector.h"

namespace {

// Applies the ReLU before a quantizer that does not include it (Quantizer::RELU).
template <class Quantizer, class C> struct AfterRelu {
    Real<C> floor;

    explicit AfterRelu(const Rule& rule) {                     // without a ReLU: NaN, which no value is <= to
        floor = all<C>(rule.relu ? C(0) : std::numeric_limits<C>::quiet_NaN());
    }
    INLINED Real<C> level(const Quantizer& quantizer, Real<C> x) const {
        return quantizer.level(Quantizer::RELU ? x : x <= floor ? floor : x);
    }
    template <class Q> INLINED Real<C> gradient(Q& quantizer, Real<C> x, Real<C> grad_output) const {
        if constexpr (Quantizer::RELU) return quantizer.gradient(x, grad_output);
        x = x <= floor ? floor : x;
        const Real<C> grad_input = quantizer.gradient(x, grad_output);
        return x == floor ? Real<C>{} : grad_input;
    }
};

// Quantizes one piece (FORWARD), or computes its input gradient and sums. `output` is null where a second pass writes
// the input gradient. sums: [slots]; norm_sums: [2, channels], for scale and bias of the batch norm.
template <bool FORWARD, class Quantizer, class S, class C>
void process_piece(const Rule& rule, const Table<C>& table, const Norm<C>& norm, int64_t start, int64_t count,
                   const S* x, const S* grad_output, S* output, double* sums, double* norm_sums) {
    constexpr bool COPIED = !FORWARD && Quantizer::SMALL;      // a local copy keeps its sums in registers
    using Local = std::conditional_t<COPIED, Quantizer, Quantizer&>;
    Quantizer quantizer(rule, table);
    const AfterRelu<Quantizer, C> after_relu(rule);
    auto compute = [=](auto& quantizer, Real<C> x, const S* grad_output) INLINED {  // output or input gradient
        if constexpr (FORWARD) return after_relu.level(quantizer, x);
        else return after_relu.gradient(quantizer, x, load(grad_output));
    };
    if (!norm.channels) {
        auto run = [&](int64_t i, const Walk& walk) {
            Local local = quantizer;
            auto step = [&](const S* x, const S* grad_output, S* output) INLINED {
                store(output, compute(local, load(x), grad_output));
            };
            vectors<FORWARD, C>(x + i, offset_by(grad_output, i), output + i, walk, step);
            if constexpr (COPIED) quantizer = local;
        };
        const int64_t rest = count % WIDTH<C>, full = count - rest;
        run(0, Walk{count / WIDTH<C>, WIDTH<C>, WIDTH<C>, AHEAD});
        if (rest) run(full, Walk{1, WIDTH<C>, rest, AHEAD});
    } else {
        norm.stretches(start, count, [&](int64_t i, const Walk& walk, int64_t channel) {
            const Real<C> mean = norm.of(norm.mean, channel), scale = norm.of(norm.scale, channel),
                          offset = norm.of(norm.bias, channel) - mean * scale;
            Real<C> grad_scale_sum{}, grad_bias_sum{};
            Local local = quantizer;
            auto step = [&](const S* x_at, const S* grad_output, S* output) INLINED {
                const Real<C> x = load(x_at), result = compute(local, x * scale + offset, grad_output);
                if constexpr (FORWARD) store(output, result);
                else {
                    grad_scale_sum += result * (x - mean);
                    grad_bias_sum += result;
                    if (output) store(output, result * scale);
                }
            };
            vectors<FORWARD, C>(x + i, offset_by(grad_output, i), offset_by(output, i), walk, step);
            if constexpr (!FORWARD) {
                if constexpr (COPIED) quantizer = local;
                norm.add(norm_sums, channel, grad_scale_sum);
                norm.add(norm_sums + norm.channels, channel, grad_bias_sum);
            }
        });
    }
    if constexpr (!FORWARD) quantizer.add_to(sums);
}

// The second pass of backward after a batch norm in training: the input gradient of one piece, with the part that goes
// through the statistics of the batch.
template <class Quantizer, class S, class C>
void norm_backward(const Rule& rule, const Table<C>& table, const Norm<C>& norm, int64_t start, int64_t count,
                   const S* x, const S* grad_output, S* grad_input) {
    const Quantizer quantizer(rule, table);
    const AfterRelu<Quantizer, C> after_relu(rule);
    norm.stretches(start, count, [&](int64_t i, const Walk& walk, int64_t channel) {
        const Real<C> mean = norm.of(norm.mean, channel), scale = norm.of(norm.scale, channel),
                      offset = norm.of(norm.bias, channel) - mean * scale,
                      through_var = norm.of(norm.through_var, channel),
                      through_mean = norm.of(norm.through_mean, channel);
        auto step = [&](const S* x_at, const S* grad_output, S* grad_input) INLINED {
            const Real<C> x = load(x_at);
            const Real<C> direct = after_relu.gradient(quantizer, x * scale + offset, load(grad_output)) * scale;
            store(grad_input, direct + ((x - mean) * through_var + through_mean));
        };
        vectors<false, C>(x + i, grad_output + i, grad_input + i, walk, step);
    });
}

// ---- the template instance for a rule

template <class S, class C, bool FROM_ZERO> auto choose_norm_backward(const Rule& rule) {
    return rule.uniform ? norm_backward<InputGradient<C, true, FROM_ZERO>, S, C>
                        : norm_backward<InputGradient<C, false, FROM_ZERO>, S, C>;
}

template <bool FORWARD, class S, class C, int COUNT, bool FROM_ZERO> auto choose_sums(const Rule& rule) {
    if constexpr (!FORWARD) {
        if (rule.reduction == PER_GAP) {
            if constexpr (COUNT == 0 || COUNT > MASKED<C>)
                return process_piece<FORWARD, ScatteredSums<C, COUNT, PER_GAP>, S, C>;
            else {
                if constexpr (COUNT > 3)
                    if (rule.low == 0) return process_piece<FORWARD, PackedSums<C, COUNT, FROM_ZERO>, S, C>;
                return process_piece<FORWARD, MaskedSums<C, COUNT, COUNT, FROM_ZERO>, S, C>;
            }
        }
        if (rule.reduction == PER_CELL) return process_piece<FORWARD, ScatteredSums<C, COUNT, PER_CELL>, S, C>;
    }
    return process_piece<FORWARD, MaskedSums<C, COUNT, 1, FROM_ZERO>, S, C>;
}

template <bool FORWARD, class S, class C, bool FROM_ZERO> auto choose_quantizer(const Rule& rule) {
    if (rule.uniform) return process_piece<FORWARD, UniformGrid<C, FROM_ZERO>, S, C>;
    switch (rule.thresholds) {                                 // the thresholds of 1 to 4 bits stay in registers
        case 1: return choose_sums<FORWARD, S, C, 1, FROM_ZERO>(rule);
        case 3: return choose_sums<FORWARD, S, C, 3, FROM_ZERO>(rule);
        case 7: return choose_sums<FORWARD, S, C, 7, FROM_ZERO>(rule);
        case 15: return choose_sums<FORWARD, S, C, 15, FROM_ZERO>(rule);
        default: return choose_sums<FORWARD, S, C, 0, FROM_ZERO>(rule);
    }
}

template <bool FORWARD, class S, class C> auto choose(const Rule& rule, bool from_zero) {
    return from_zero ? choose_quantizer<FORWARD, S, C, true>(rule) : choose_quantizer<FORWARD, S, C, false>(rule);
}

// ---- a call: S is the storage type of x and of all tensors of its shape, C the computation type

template <class S, class C> void run(const Call& call) {
    const Rule& rule = call.rule;
    Norm<C> norm(call);
    const int64_t rows = call.table_rows, elements = call.elements, pieces = norm.pieces(elements);
    const int slots = call.grad_output ? slots_of(rule) : 0, norm_slots = call.grad_output ? 2 * call.channels : 0;
    std::vector<Table<C>> tables(rows);
    bool from_zero = rule.relu && (!rule.uniform || rule.low + rule.shift == 0);
    for (int64_t r = 0; r < rows; r++) {
        tables[r].read(rule, (const C*)call.gaps + r * call.gap_count,
                       (const C*)call.levels + r * (rule.thresholds + 1),
                       (const C*)call.thresholds + r * rule.thresholds, call.ties_up);
        from_zero = from_zero && (rule.uniform || tables[r].levels[0] == 0);
        if (by_halves<C>(tables[r].count)) tables[r].sort_into_halves();
        if (tables[r].count > CHAIN && elements > 4 * Table<C>::BUCKETS) tables[r].sort_into_buckets();
    }
    std::vector<double> partial(rows * pieces * slots, 0.0), norm_partial(pieces * norm_slots, 0.0);
    const auto process = call.grad_output ? choose<false, S, C>(rule, from_zero) : choose<true, S, C>(rule, from_zero);
    const S *x = (const S*)call.x, *grad_output = (const S*)call.grad_output;
    S* output = (S*)call.output;
    const bool second_pass = call.grad_output && call.rstd;
    by_pieces(call, norm, [&](int64_t task, int64_t start, int64_t count) {
        const int64_t r = task / pieces, at = r * elements + start;
        process(rule, tables[r], norm, start, count, x + at, offset_by(grad_output, at),
                second_pass ? nullptr : output + at, partial.data() + task * slots,
                norm_partial.data() + task * norm_slots);
    });
    for (int64_t s = 0; s < norm_slots; s++) {
        double total = 0;
        for (int64_t piece = 0; piece < pieces; piece++) total += norm_partial[piece * norm_slots + s];
        if (s < call.channels) ((C*)call.grad_scale_sum)[s] = total;
        else ((C*)call.grad_bias_sum)[s - call.channels] = total;
    }
    if (second_pass) {
        const auto backward = from_zero ? choose_norm_backward<S, C, true>(rule)
                                        : choose_norm_backward<S, C, false>(rule);
        norm.prepare_backward(call);
        by_pieces(call, norm, [&](int64_t, int64_t start, int64_t count) {
            backward(rule, tables[0], norm, start, count, x + start, grad_output + start, output + start);
        });
    }
    if (!slots) return;

    C *grad_gaps = (C*)call.grad_gaps, *grad_offset = (C*)call.grad_offset, *grad_slope = (C*)call.grad_slope;
    const int gap_count = call.gap_count;
    const C* gaps = (const C*)call.gaps;
    const int cells = rule.thresholds + rule.segments;
    const int last = rule.reduction == TOTAL ? 2 : rule.reduction == PER_GAP ? rule.thresholds + 1 : cells + 1;
    for (int64_t r = 0; r < rows; r++) {
        std::vector<double> total(slots, 0.0);
        for (int64_t piece = 0; piece < pieces; piece++)
            for (int s = 0; s < slots; s++) total[s] += partial[(r * pieces + piece) * slots + s];
        const double below = total[0], above = total[last];
        if (rule.reduction == PER_GAP) {                       // an end level is the sum of the gaps from zero to it
            for (int k = 0; k < gap_count; k++)
                grad_gaps[r * gap_count + k] = total[1 + k] / gaps[r * gap_count + k]
                                             + (k < -rule.low ? -below : above);
            continue;
        }
        if (rule.uniform) {                                    // UniformGrid adds up in units of the step
            grad_gaps[r] = total[1] + total[2];
            continue;
        }
        const double unit = gaps[r];
        grad_gaps[r] = (tables[r].levels[0] * below + tables[r].levels[rule.thresholds] * above) / unit;
        if (rule.reduction == TOTAL) grad_gaps[r] += total[1] / unit;
        else for (int m = 0; m < cells; m++) {
            grad_offset[r * cells + m] = total[1 + m];
            grad_slope[r * cells + m] = total[cells + 3 + m];
        }
    }
}

}  // namespace

#define FOR_EACH_STORAGE(name, function)                               \
    extern "C" void name(const Call* call) {                           \
        if (call->storage == 0) function<float, float>(*call);         \
        else if (call->storage == 1) function<BFloat16, float>(*call); \
        else function<double, double>(*call);                          \
    }
FOR_EACH_STORAGE(nulsq_run, run)
FOR_EACH_STORAGE(nulsq_moments, moments)
