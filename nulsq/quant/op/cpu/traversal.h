// The order in which the kernels of cpu.cpp visit memory, and the batch norm before a quantizer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "rules.h"
#include "vector.h"

namespace {

constexpr int64_t PIECE = 8192;  // elements
constexpr int64_t ROWS = 128;    // fewest rows of channels in a piece: starting and ending a stretch is expensive
constexpr int64_t AHEAD = 512;   // elements to prefetch in advance; the hardware's own prefetching is too late

// The arguments of all functions; kernel.py has the same structure. Tables are [table_rows, ...] in the computation
// type. x and all tensors of its shape have one memory order, with the dimension of the table's rows outermost. After a
// batch norm there is one row, and `channels` is the size of dimension 1 of x, along which elements are `plane` apart.
struct Call {
    Rule rule;
    int storage, threads, gap_count;                           // storage: 0 float, 1 bfloat16, 2 double
    int64_t table_rows, elements, channels, plane;             // elements of one row; channels 0: no batch norm
    // forward: grad_output is null, output is y; backward: output is the gradient of x
    const uint8_t* ties_up;
    const void *gaps, *levels, *thresholds, *mean, *scale, *bias, *rstd, *x, *grad_output;
    void *output, *grad_gaps, *grad_offset, *grad_slope, *grad_scale_sum, *grad_bias_sum;
    void *batch_mean, *batch_var;                              // results of `moments`
};

// `repeat` vectors of `lanes` elements each, `stride` apart, of one channel or of WIDTH adjacent channels. The first
// prefetches the memory `ahead` elements after it, each further one that of the next vector.
struct Walk {
    int64_t repeat, stride, lanes, ahead;
};

// The batch norm before a quantizer: (x - mean) scale + bias with a mean, scale and bias for each channel. The elements
// of a channel are contiguous, `plane` of them at a time; a plane of 1 is channels last.
template <class C> struct Norm {
    int64_t channels, plane;
    std::vector<C> mean, scale, bias;                          // padded, so that a vector can start at the last channel
    std::vector<C> through_var, through_mean;                  // grad_input: + (x - mean) through_var + through_mean

    explicit Norm(const Call& call) : channels(call.channels), plane(call.plane) {
        for (auto [to, from] : {std::pair(&mean, call.mean), {&scale, call.scale}, {&bias, call.bias}}) {
            if (from) to->assign((const C*)from, (const C*)from + channels);
            to->resize(channels + WIDTH<C>);
        }
    }
    // For statistics of the batch itself: scale is weight rstd, rstd is 1 / sqrt(var + eps);
    // d rstd / d x = -rstd^3 (x - mean) / count,  d mean / d x = 1 / count.
    void prepare_backward(const Call& call) {
        through_var.assign(channels + WIDTH<C>, 0), through_mean = through_var;
        const double count = double(call.elements) / channels;
        for (int64_t c = 0; c < channels; c++) {
            const double rstd = ((const C*)call.rstd)[c];
            through_var[c] = -((const C*)call.grad_scale_sum)[c] * scale[c] * rstd * rstd / count;
            through_mean[c] = -((const C*)call.grad_bias_sum)[c] * double(scale[c]) / count;
        }
    }
    Real<C> of(const std::vector<C>& values, int64_t channel) const {
        return plane == 1 ? load(values.data() + channel) : all<C>(values[channel]);
    }
    // Elements of a piece: about PIECE. In channels last whole rows of channels, at least ROWS of them unless that is
    // far more than PIECE.
    int64_t piece() const {
        if (!channels || plane > 1) return PIECE;
        return std::max<int64_t>(1, std::clamp(ROWS, PIECE / channels, 8 * PIECE / channels)) * channels;
    }
    int64_t pieces(int64_t elements) const { return (elements + piece() - 1) / piece(); }
    // Calls visit(at, walk, channel) for the stretches that make up the `count` elements from `start` on.
    template <class F> void stretches(int64_t start, int64_t count, F visit) const {
        if (plane == 1) {
            // Rows that are wider than a vector are visited in several stretches over the same piece. Together the
            // stretches prefetch the next piece.
            const int64_t rows = count / channels;
            for (int64_t c = 0; c < channels; c += WIDTH<C>)
                visit(c, Walk{rows, channels, std::min<int64_t>(WIDTH<C>, channels - c),
                              channels > WIDTH<C> ? count + c * rows - c : AHEAD}, c);
            return;
        }
        for (int64_t i = 0; i < count;) {
            const int64_t run = std::min(plane - (start + i) % plane, count - i), rest = run % WIDTH<C>;
            const int64_t channel = (start + i) / plane % channels;
            if (run > rest) visit(i, Walk{run / WIDTH<C>, WIDTH<C>, WIDTH<C>, AHEAD}, channel);
            if (rest) visit(i + run - rest, Walk{1, WIDTH<C>, rest, AHEAD}, channel);
            i += run;
        }
    }
    __attribute__((noinline)) void add(double* to, int64_t channel, Real<C> sums) const {
        for (int64_t j = 0; j < WIDTH<C> && (plane > 1 || channel + j < channels); j++)
            to[plane == 1 ? channel + j : channel] += sums[j];
    }
};

template <class S> inline S* offset_by(S* from, int64_t i) { return from ? from + i : from; }  // null stays null

// Calls step(x, grad_output, output) for the vectors of a walk. A vector that is not full is copied and padded with
// zeros; a zero gradient adds nothing to the sums. A pointer that is null is null for `step` too.
template <bool FORWARD, class C, class S, class F>
INLINED inline void vectors(const S* x, const S* grad_output, S* output, const Walk& walk, F step) {
    const int64_t stride = walk.stride, lanes = walk.lanes, end = walk.repeat * stride;
    if (lanes == WIDTH<C>) {
        for (int64_t i = 0, next = walk.ahead; i < end; i += stride, next += WIDTH<C>) {
            const S* grad = FORWARD ? grad_output : grad_output + i;
            __builtin_prefetch(x + next);
            if (!FORWARD) __builtin_prefetch(grad_output + next);
            if (output) __builtin_prefetch(output + next, 1);
            step(x + i, grad, offset_by(output, i));
        }
        return;
    }
    // A separate loop: a call in the one above would move its sums out of registers.
    for (int64_t i = 0; i < end; i += stride) {
        const S* grad = FORWARD ? grad_output : grad_output + i;
        S some_x[WIDTH<C>] = {}, some_grad[WIDTH<C>] = {}, done[WIDTH<C>];
        std::copy(x + i, x + i + lanes, some_x);
        if (!FORWARD) std::copy(grad, grad + lanes, some_grad);
        step(some_x, some_grad, output ? done : output);
        if (output) std::copy(done, done + lanes, output + i);
    }
}

// Calls process(task, start, count) for the pieces of every row of the table, in parallel: task / pieces is the row,
// `start` the piece's first element in it.
template <class C, class F> void by_pieces(const Call& call, const Norm<C>& norm, F process) {
    const int64_t pieces = norm.pieces(call.elements), size = norm.piece();
#pragma omp parallel for num_threads(call.threads) if (call.threads > 1 && call.table_rows * call.elements > 4 * PIECE)
    for (int64_t task = 0; task < call.table_rows * pieces; task++) {
        const int64_t start = task % pieces * size;
        process(task, start, std::min(size, call.elements - start));
    }
}

// Mean and variance of each channel, from sums of x - pivot and of its square. The pivot is the channel's first
// element, which keeps the sums small. The mean of no elements is NaN.
template <class S, class C> void moments(const Call& call) {
    Norm<C> norm(call);
    std::vector<C>& pivots = norm.mean;
    for (int64_t c = 0; call.elements && c < call.channels; c++) {
        S first[WIDTH<C>] = {((const S*)call.x)[c * call.plane]};
        pivots[c] = load(first)[0];
    }
    const int64_t channels = call.channels, count = call.elements / channels;
    std::vector<double> partial(norm.pieces(call.elements) * 2 * channels, 0.0), total(2 * channels, 0.0);
    by_pieces(call, norm, [&](int64_t piece, int64_t start, int64_t piece_count) {
        norm.stretches(start, piece_count, [&](int64_t i, const Walk& walk, int64_t channel) {
            const Real<C> pivot = norm.of(pivots, channel);
            Real<C> sum{}, squares{};
            Int<C> counted;                                    // excludes the padding of a vector that is not full
            for (int64_t j = 0; j < WIDTH<C>; j++) counted[j] = j < walk.lanes ? -1 : 0;
            auto step = [&](const S* x, const S*, S*) INLINED {
                const Real<C> distance = where<C>(counted, load(x) - pivot);
                sum += distance;
                squares += distance * distance;
            };
            const S* none = nullptr;
            vectors<true, C>((const S*)call.x + start + i, none, (S*)nullptr, walk, step);
            norm.add(partial.data() + piece * 2 * channels, channel, sum);
            norm.add(partial.data() + (piece * 2 + 1) * channels, channel, squares);
        });
    });
    for (size_t s = 0; s < partial.size(); s++) total[s % (2 * channels)] += partial[s];
    for (int64_t c = 0; c < channels; c++) {
        const double mean = total[c] / count;
        ((C*)call.batch_mean)[c] = pivots[c] + mean;
        ((C*)call.batch_var)[c] = std::max(0.0, total[channels + c] / count - mean * mean);
    }
}

}  // namespace
