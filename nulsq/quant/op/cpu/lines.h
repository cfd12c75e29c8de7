// How the kernels of cpu.cpp go over memory, and the batch norm before a quantizer: a line for each channel of x.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "lanes.h"
#include "table.h"

namespace {

constexpr int64_t PIECE = 8192;
constexpr int64_t ROWS = 128;    // of channels, in a piece at least: what a stretch begins and ends with is dear
constexpr int64_t AHEAD = 512;   // elements that memory is asked for in advance: by itself it is late

// What all functions are called with, as cpu.py lays it out. Tables are [channels, ...] in the type of computation; x
// and all that has its shape are in one order of memory with the channels outermost. Behind a batch norm there is one
// table, and `features` lines: of dimension 1 of x, along which elements lie `plane` apart.
struct Call {
    Rule rule;
    int storage, threads, gap_count;                           // storage: 0 float, 1 bfloat16, 2 double
    int64_t channels, elements, features, plane;               // elements of a channel; features 0: no lines
    const uint8_t* ties_up;
    const void *gaps, *levels, *thresholds, *center, *scale, *shift, *inverse, *x, *dy;  // dy: null forward
    void *out, *dgaps, *doffset, *dslope, *dscale, *dshift;    // out: y or dx
};

// `repeat` vectors of `lanes` elements each, `stride` apart, of one channel or of WIDTH channels beside each other; the
// first of them asks memory for what lies `ahead` elements behind it, each further one for the next vector.
struct Walk {
    int64_t repeat, stride, lanes, ahead;
};

// A line for each channel of x: (x - center) scale + shift. A channel's elements lie together, `plane` by `plane`; or,
// where that is 1, beside those of the other channels: channels last.
template <class C> struct Lines {
    int64_t features, plane;
    std::vector<C> center, scale, shift;                       // with room for a vector from the last channel on
    std::vector<C> slope, rise;                                // dx gets (x - center) slope + rise through the batch

    explicit Lines(const Call& call) : features(call.features), plane(call.plane) {
        for (auto [to, from] : {std::pair(&center, call.center), {&scale, call.scale}, {&shift, call.shift}}) {
            if (from) to->assign((const C*)from, (const C*)from + features);
            to->resize(features + WIDTH<C>);
        }
    }
    // Of the batch's own statistics: center is the mean, scale is weight inverse, inverse is 1 / sqrt(var + eps);
    // d inverse / d x = -inverse^3 (x - mean) / count,  d mean / d x = 1 / count.
    void pass_on(const Call& call) {
        slope.assign(features + WIDTH<C>, 0), rise = slope;
        const double count = double(call.elements) / features;
        for (int64_t c = 0; c < features; c++) {
            const double inverse = ((const C*)call.inverse)[c];
            slope[c] = -((const C*)call.dscale)[c] * scale[c] * inverse * inverse / count;
            rise[c] = -((const C*)call.dshift)[c] * double(scale[c]) / count;
        }
    }
    Real<C> of(const std::vector<C>& values, int64_t channel) const {
        return plane == 1 ? load(values.data() + channel) : all<C>(values[channel]);
    }
    // Elements that can be walked by themselves: about PIECE; of whole rows of channels ROWS, if that is not much more.
    int64_t piece() const {
        if (!features || plane > 1) return PIECE;
        return std::max<int64_t>(1, std::clamp(ROWS, PIECE / features, 8 * PIECE / features)) * features;
    }
    int64_t pieces(int64_t elements) const { return (elements + piece() - 1) / piece(); }
    // Calls each(at, walk, channel) for the stretches that make up the elements from `start` on.
    template <class F> void stretches(int64_t start, int64_t count, F each) const {
        if (plane == 1) {
            // Where a row is wider than a vector its stretches go over the piece again and again: what they ask memory
            // for, one after the other, is the next piece.
            const int64_t rows = count / features;
            for (int64_t c = 0; c < features; c += WIDTH<C>)
                each(c, Walk{rows, features, std::min<int64_t>(WIDTH<C>, features - c),
                             features > WIDTH<C> ? count + c * rows - c : AHEAD}, c);
            return;
        }
        for (int64_t i = 0; i < count;) {
            const int64_t run = std::min(plane - (start + i) % plane, count - i), rest = run % WIDTH<C>;
            const int64_t channel = (start + i) / plane % features;
            if (run > rest) each(i, Walk{run / WIDTH<C>, WIDTH<C>, WIDTH<C>, AHEAD}, channel);
            if (rest) each(i + run - rest, Walk{1, WIDTH<C>, rest, AHEAD}, channel);
            i += run;
        }
    }
    __attribute__((noinline)) void add(double* to, int64_t channel, Real<C> sums) const {
        for (int64_t j = 0; j < WIDTH<C> && (plane > 1 || channel + j < features); j++)
            to[plane == 1 ? channel + j : channel] += sums[j];
    }
};

template <class S> inline S* along(S* from, int64_t i) { return from ? from + i : from; }  // null stays null

// Calls step for the vectors of a walk. One that is not full is copied: beside it stand zeros, and a zero gradient adds
// nothing. What is null stays null for `step`.
template <bool FORWARD, class C, class S, class F>
INLINED inline void vectors(const S* x, const S* dy, S* out, const Walk& walk, F step) {
    const int64_t stride = walk.stride, lanes = walk.lanes, end = walk.repeat * stride;
    if (lanes == WIDTH<C>) {
        for (int64_t i = 0, next = walk.ahead; i < end; i += stride, next += WIDTH<C>) {
            const S* beside = FORWARD ? dy : dy + i;
            __builtin_prefetch(x + next);
            if (!FORWARD) __builtin_prefetch(dy + next);
            if (out) __builtin_prefetch(out + next, 1);
            step(x + i, beside, along(out, i));
        }
        return;
    }
    for (int64_t i = 0; i < end; i += stride) {                // a loop of its own: a call in it costs the other sums
        const S* beside = FORWARD ? dy : dy + i;
        S some[WIDTH<C>] = {}, some_beside[WIDTH<C>] = {}, done[WIDTH<C>];
        std::copy(x + i, x + i + lanes, some);
        if (!FORWARD) std::copy(beside, beside + lanes, some_beside);
        step(some, some_beside, out ? done : out);
        if (out) std::copy(done, done + lanes, out + i);
    }
}

// each(task, start, count) for the pieces of every channel of the table, several at a time: task / pieces is the
// channel, `start` the piece's place in it.
template <class C, class F> void by_pieces(const Call& call, const Lines<C>& lines, F each) {
    const int64_t pieces = lines.pieces(call.elements), size = lines.piece();
#pragma omp parallel for num_threads(call.threads) if (call.threads > 1 && call.channels * call.elements > 4 * PIECE)
    for (int64_t task = 0; task < call.channels * pieces; task++) {
        const int64_t start = task % pieces * size;
        each(task, start, std::min(size, call.elements - start));
    }
}

// Mean (dscale) and variance (dshift) of each channel, from sums of x - center and of its square, where center is the
// channel's first number: like the others. Of nothing the mean is NaN.
template <class S, class C> void moments(const Call& call) {
    Lines<C> lines(call);
    for (int64_t c = 0; call.elements && c < call.features; c++) {
        S first[WIDTH<C>] = {((const S*)call.x)[c * call.plane]};
        lines.center[c] = load(first)[0];
    }
    const int64_t features = call.features, each = call.elements / features;
    std::vector<double> partial(lines.pieces(call.elements) * 2 * features, 0.0), total(2 * features, 0.0);
    by_pieces(call, lines, [&](int64_t piece, int64_t start, int64_t count) {
        lines.stretches(start, count, [&](int64_t i, const Walk& walk, int64_t channel) {
            const Real<C> center = lines.of(lines.center, channel);
            Real<C> sum{}, squares{};
            Int<C> counted;                                    // not what stands beside a vector that is not full
            for (int64_t j = 0; j < WIDTH<C>; j++) counted[j] = j < walk.lanes ? -1 : 0;
            auto step = [&](const S* x, const S*, S*) INLINED {
                const Real<C> away = where<C>(counted, load(x) - center);
                sum += away;
                squares += away * away;
            };
            const S* none = nullptr;
            vectors<true, C>((const S*)call.x + start + i, none, (S*)nullptr, walk, step);
            lines.add(partial.data() + piece * 2 * features, channel, sum);
            lines.add(partial.data() + (piece * 2 + 1) * features, channel, squares);
        });
    });
    for (size_t s = 0; s < partial.size(); s++) total[s % (2 * features)] += partial[s];
    for (int64_t c = 0; c < features; c++) {
        const double mean = total[c] / each;
        ((C*)call.dscale)[c] = lines.center[c] + mean;
        ((C*)call.dshift)[c] = std::max(0.0, total[features + c] / each - mean * mean);
    }
}

}  // namespace
