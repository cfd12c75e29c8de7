// Level (forward), input gradient and sums (backward) of one vector of elements, for each type of quantizer:
//
//   UniformGrid    equal steps
//   MaskedSums     a table of levels; one accumulator for each gap, in registers
//   PackedSums     the same for 7 gaps and more on a range from zero: elements inside the range are collected first
//   ScatteredSums  any number of gaps or cells: sums in memory
//   InputGradient  the input gradient only, without sums
//
// Look-up of a level. Up to CHAIN thresholds: compare and select, a few instructions for a whole vector. 15 thresholds,
// and 7 where a vector holds 16 numbers: binary search with vectors as tables. More thresholds: equal buckets say how
// many thresholds are below x's bucket, and only those inside the bucket are compared. x and the thresholds go through
// the same rounded, monotone function to their buckets, so the result is exact.
// Ties. x >= t is x > the float just below t, so all thresholds use one kind of comparison.
// ReLU. On a range that begins at zero the comparisons with the range include it: FROM_ZERO.
// PackedSums and ScatteredSums process collected elements many vectors later: reading single numbers of a vector that
// was stored a moment ago is slow.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rules.h"
#include "vector.h"

namespace {

template <class C> constexpr int MASKED = WIDTH<C> > 8 ? 15 : 7;  // most gaps with an accumulator each
template <class C> constexpr bool by_halves(int count) {
    return count == 15 ? PICKS<C> > 0 : count == 7 && PICKS<C> > 8;
}

// Level of a vector of elements and, if WITH_INDEX, its index. A NaN has index 0; if KEEP_NAN, its level is NaN.
// COUNT: number of thresholds, 0 if it is not known at compile time.
template <int COUNT, bool WITH_INDEX, bool KEEP_NAN, class C>
INLINED inline Real<C> look_up(const Table<C>& table, Real<C> x, Int<C>& index) {
    if (COUNT == 0 && !table.below.empty()) {
        Integer<C> at[WIDTH<C>];
        C value[WIDTH<C>], level[WIDTH<C>];
        store(at, table.bucket(x));
        store(value, x);
        for (int j = 0; j < WIDTH<C>; j++) at[j] = table.below[at[j]];
        for (int m = 0; m < table.inside; m++)
            for (int j = 0; j < WIDTH<C>; j++) at[j] += value[j] > table.thresholds[at[j]];
        for (int j = 0; j < WIDTH<C>; j++) level[j] = table.levels[at[j]];
        if (WITH_INDEX) index = load(at);
        return KEEP_NAN ? x == x ? load(level) : x : load(level);
    }
    if constexpr (by_halves<C>(COUNT)) {
        constexpr int half = (COUNT + 1) / 2;
        Int<C> part{};
        add_where(part, x > all<C>(table.thresholds[half - 1]), Int<C>{} + 1);
        for (int d = 0; 2 << d <= half; d++) {
            Int<C> beyond = x > pick<C>(table.middle[d], part);
            part += part;
            add_where(part, beyond, Int<C>{} + 1);
        }
        Real<C> y = pick<C>(table.low_levels, part);
        if (COUNT >= PICKS<C>) y = part >= PICKS<C> ? pick<C>(table.high_levels, part) : y;
        if (WITH_INDEX) index = part;
        return KEEP_NAN ? x == x ? y : x : y;
    }
    const Real<C> lowest = all<C>(table.levels[0]);
    Real<C> y = KEEP_NAN ? x == x ? lowest : x : lowest;
    if (WITH_INDEX) index = Int<C>{};
    const int count = COUNT ? COUNT : table.count;
#pragma GCC unroll 15
    for (int k = 0; k < count; k++) {
        Int<C> above = x > all<C>(table.thresholds[k]);
        y = above ? all<C>(table.levels[k + 1]) : y;
        if (WITH_INDEX) index -= above;
    }
    return y;
}

// Whether x is in a range, ends included; a NaN is not.
template <class C> INLINED inline Int<C> within(Real<C> x, C low, C high) { return clamp<C>(x, low, high) == x; }

// The gradient of x by the straight-through rule. FROM_ZERO: after a ReLU, for a range that begins at zero.
template <bool FROM_ZERO, class C>
INLINED inline Real<C> input_gradient(int ste, Real<C> grad_output, Real<C> x, Int<C> inside) {
    if (ste == CLIP) return where<C>(FROM_ZERO ? inside & (x > C(0)) : inside, grad_output);
    return FROM_ZERO ? where<C>(~(x <= C(0)), grad_output) : grad_output;
}

template <class C, bool FROM_ZERO> struct UniformGrid {
    static constexpr bool RELU = FROM_ZERO;                    // includes the ReLU before it
    static constexpr bool SMALL = true;                        // small enough for a copy in registers
    Rule rule;
    C step, shift = rule.shift, low = rule.low + shift, high = rule.high + shift;
    Real<C> error{}, ends{};                                   // sums over the elements inside and beyond the range

    UniformGrid(const Rule& rule, const Table<C>& table) : rule(rule), step(table.step) {}

    INLINED Real<C> level(Real<C> x) const {
        return (round_half_even<C>(clamp<C>(x / step - shift, rule.low, rule.high)) + shift) * step;
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> grad_output) {
        const Real<C> in_steps = x / step, clamped = clamp<C>(in_steps, low, high);
        const Int<C> inside = clamped == in_steps;
        if (rule.reduction != NO_SUMS) {
            const Real<C> nearest = round_half_even<C>(clamped - shift) + shift;
            add_where(error, inside, (nearest - in_steps) * grad_output);
            add_where(ends, (clamped < in_steps) | (clamped > in_steps), nearest * grad_output);  // a NaN is in neither
        }
        return input_gradient<FROM_ZERO, C>(rule.ste, grad_output, x, inside);
    }
    void add_to(double* total) const {
        if (rule.reduction == NO_SUMS) return;
        for (int j = 0; j < WIDTH<C>; j++) total[1] += error[j], total[2] += ends[j];
    }
};

// Number of sums. Slot 0: below the range; then one for each gap or cell; the last: above the range. PER_CELL has as
// many again, of grad_output (x - start of the segment).
int slots_of(const Rule& rule) {
    switch (rule.reduction) {
        case NO_SUMS: return 0;
        case TOTAL: return 3;
        case PER_GAP: return rule.thresholds + 2;
        default: return 2 * (rule.thresholds + rule.segments + 2);
    }
}

// Adds the sums below, above and inside the range to their slots. sums[k] is over all elements above level k, so the
// sum of a gap is the difference of two.
template <class C, int GAPS>
void add_gaps(double* total, Real<C> below, Real<C> above, const Real<C> (&sums)[GAPS]) {
    for (int j = 0; j < WIDTH<C>; j++) {
        total[0] += below[j], total[GAPS + 1] += above[j];
        for (int k = 0; k < GAPS; k++) total[k + 1] += sums[k][j] - (k + 1 < GAPS ? double(sums[k + 1][j]) : 0);
    }
}

// One accumulator for each of GAPS gaps, or one for all of them (GAPS = 1). Accumulator k adds up all elements above
// level k: that is one comparison, where "in gap k" would be two.
template <class C, int COUNT, int GAPS, bool FROM_ZERO> struct MaskedSums {
    static constexpr bool RELU = FROM_ZERO, SMALL = true;
    Rule rule;
    const Table<C>* table;
    C low = FROM_ZERO ? 0 : table->levels[0], high = table->levels[table->count];
    Real<C> below{}, above{}, sums[GAPS] = {};

    MaskedSums(const Rule& rule, const Table<C>& table) : rule(rule), table(&table) {}

    INLINED Real<C> level(Real<C> x) const {
        Int<C> unused;
        return look_up<COUNT, false, true>(*table, x, unused);
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> grad_output) {
        const Int<C> inside = within<C>(x, low, high);
        if (rule.reduction != NO_SUMS) {
            Int<C> unused;
            const Real<C> y = look_up<COUNT, false, false>(*table, x, unused);
            const Real<C> error = where<C>(inside, (y - x) * grad_output);
            if (!FROM_ZERO) add_where(below, x < low, grad_output);
            add_where(above, x > high, grad_output);
            sums[0] += error;
#pragma GCC unroll 15
            for (int k = 1; k < GAPS; k++) add_where(sums[k], x > all<C>(table->levels[k]), error);
        }
        return input_gradient<FROM_ZERO, C>(rule.ste, grad_output, x, inside);
    }
    void add_to(double* total) const {
        if (rule.reduction != NO_SUMS) add_gaps<C>(total, below, above, sums);
    }
};

// Collects the elements inside the range until there are many vectors of them.
template <class C> struct Collected {
    static constexpr int CAPACITY = 1024;
    C xs[CAPACITY + WIDTH<C>], grads[CAPACITY + WIDTH<C>];
    int waiting = 0;

    template <class F> INLINED void put(Real<C> x, Real<C> grad_output, Int<C> inside, F add) {
        store(xs + waiting, pack<C>(x, inside));
        store(grads + waiting, pack<C>(grad_output, inside));
        waiting += lanes_in<C>(inside);
        if (waiting >= CAPACITY) {
            add(CAPACITY);
            waiting -= CAPACITY;
            store(xs, load(xs + CAPACITY));
            store(grads, load(grads + CAPACITY));
        }
    }
    template <class F> void flush(C inside, F add) {           // padded with zero gradients, which add nothing
        store(xs + waiting, all<C>(inside));
        store(grads + waiting, Real<C>{});
        add(waiting);
        waiting = 0;
    }
};

// As MaskedSums, over collected elements. With many accumulators that pays off where half of the elements are outside
// the range, as after a ReLU.
template <class C, int COUNT, bool FROM_ZERO> struct PackedSums {
    static constexpr bool RELU = FROM_ZERO, SMALL = false;
    const Rule& rule;
    const Table<C>& table;
    const C low = FROM_ZERO ? 0 : table.levels[0], high = table.levels[COUNT];
    Collected<C> collected;
    Real<C> above{}, sums[COUNT] = {};

    PackedSums(const Rule& rule, const Table<C>& table) : rule(rule), table(table) {}

    INLINED Real<C> gradient(Real<C> x, Real<C> grad_output) {
        add_where(above, x > high, grad_output);               // elements below zero add to no gap
        collected.put(x, grad_output, (x > low) & (x <= high), [&](int count) { add_collected(count); });
        return input_gradient<FROM_ZERO, C>(rule.ste, grad_output, x, within<C>(x, low, high));
    }
    __attribute__((noinline)) void add_collected(int count) {  // not inlined: its sums need all registers
        Real<C> local[COUNT];
        std::copy(sums, sums + COUNT, local);
        for (int i = 0; i < count; i += WIDTH<C>) {
            const Real<C> x = load(collected.xs + i);
            Int<C> unused;
            const Real<C> error = (look_up<COUNT, false, false>(table, x, unused) - x) * load(collected.grads + i);
            local[0] += error;
#pragma GCC unroll 15
            for (int k = 1; k < COUNT; k++) add_where(local[k], x > all<C>(table.levels[k]), error);
        }
        std::copy(local, local + COUNT, sums);
    }
    void add_to(double* total) {
        collected.flush(high, [&](int count) { add_collected(count); });
        add_gaps<C>(total, Real<C>{}, above, sums);
    }
};

// Sums in memory, indexed by slot. Every lane has its own column, so that lanes do not wait for each other.
template <class C, int COUNT, Reduction REDUCTION> struct ScatteredSums {
    static constexpr bool RELU = false, SMALL = false;
    static constexpr int SLOTS = REDUCTION == PER_GAP ? (COUNT ? COUNT + 2 : MOST + 2) : 2 * (2 * MOST + 2);
    const Rule& rule;
    const Table<C>& table;
    const C low = table.levels[0], high = table.levels[table.count], width = (high - low) / std::max(1, rule.segments);
    const int slots = slots_of(rule), ends = REDUCTION == PER_GAP ? slots : slots / 2, above_all = ends - 1;
    Collected<C> collected;
    C columns[WIDTH<C>][SLOTS];
    Integer<C> slot_of[Collected<C>::CAPACITY + WIDTH<C>];
    Real<C> below{}, lowest{}, above{};

    ScatteredSums(const Rule& rule, const Table<C>& table) : rule(rule), table(table) {
        for (auto& column : columns) std::fill(column, column + slots, C(0));
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> grad_output) {
        add_where(below, x < low, grad_output);
        if (REDUCTION == PER_CELL) add_where(lowest, x == low, grad_output);
        add_where(above, x > high, grad_output);
        collected.put(x, grad_output, (x > low) & (x <= high), [&](int count) { add_collected(count); });
        return input_gradient<false, C>(rule.ste, grad_output, x, within<C>(x, low, high));
    }
    void add_collected(int count) {
        C *xs = collected.xs, *grads = collected.grads;
        for (int i = 0; i < count; i += WIDTH<C>) {
            Real<C> x = load(xs + i), grad_output = load(grads + i);
            Int<C> slot;
            Real<C> y = look_up<COUNT, true, false>(table, x, slot);
            if constexpr (REDUCTION == PER_GAP) {
                slot -= x > y;
                store(grads + i, (y - x) * grad_output);
            } else {
                Int<C> number = __builtin_convertvector(clamp<C>((x - low) / width, 0, rule.segments - 1), Int<C>);
                slot += number + 1;
                store(xs + i, (x - (low + __builtin_convertvector(number, Real<C>) * width)) * grad_output);
            }
            store(slot_of + i, slot);
        }
        add_at_slots(grads, 0, count);
        if (REDUCTION == PER_CELL) add_at_slots(xs, ends, count);
    }
    void add_at_slots(const C* values, int first, int count) {
        for (int i = 0; i < count; i += WIDTH<C>)
#pragma GCC unroll 16
            for (int j = 0; j < WIDTH<C>; j++) columns[j][first + slot_of[i + j]] += values[i + j];
    }
    void add_to(double* total) {
        collected.flush(low, [&](int count) { add_collected(count); });
        for (int j = 0; j < WIDTH<C>; j++) {
            for (int s = 0; s < slots; s++) total[s] += columns[j][s];
            total[0] += below[j], total[1] += lowest[j], total[above_all] += above[j];
        }
    }
};

// The input gradient without sums. It depends only on the ends of the range.
template <class C, bool UNIFORM, bool FROM_ZERO> struct InputGradient {
    static constexpr bool RELU = FROM_ZERO;
    int ste;
    C step, low, high;

    InputGradient(const Rule& rule, const Table<C>& table) : ste(rule.ste), step(table.step) {
        low = UNIFORM ? C(rule.low + rule.shift) : table.levels[0];
        high = UNIFORM ? C(rule.high + rule.shift) : table.levels[table.count];
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> grad_output) const {
        return input_gradient<FROM_ZERO, C>(ste, grad_output, x, within<C>(UNIFORM ? x / step : x, low, high));
    }
};

}  // namespace
