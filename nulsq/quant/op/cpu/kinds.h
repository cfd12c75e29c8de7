// What is done with one vector, by kind of quantizer: `level` (forward), `gradient` (dx, and its sums), or both.
//
//   index     up to CHAIN thresholds: compare and select, a few instructions for a whole vector. 15 thresholds, and 7
//             where a vector holds 16 numbers, by halves, with vectors as tables. More: equal buckets say how many
//             thresholds lie below x's bucket, and only those inside it are compared. x and thresholds go to buckets
//             by one rounded, monotone function, so the answer is exact.
//   ties      x >= t is x > the float just below t: one kind of comparison for both.
//   relu      of a range that begins at zero, folded into its comparisons: FROM_ZERO.
//   sums      up to MASKED gaps: an accumulator each; of 7 and more, what lies inside a range from zero is put aside
//             first, packed. Else each lane adds what was put aside at its slot in a column of its own, many vectors
//             later: what was stored as a vector a moment ago is slow to read as numbers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "table.h"

namespace {

template <class C> constexpr int MASKED = WIDTH<C> > 8 ? 15 : 7;  // gaps with an accumulator each

template <class C> constexpr bool by_halves(int count) {
    return count == 15 ? PICKS<C> > 0 : count == 7 && PICKS<C> > 8;
}

// Level and, where WITH_INDEX, level index of a vector; a NaN has index 0 and, where KEEP_NAN, stays one. COUNT
// thresholds, 0: any number.
template <int COUNT, bool WITH_INDEX, bool KEEP_NAN, class C>
INLINED inline Real<C> look_up(const Table<C>& table, Real<C> x, Int<C>& index) {
    if (COUNT == 0 && !table.below.empty()) {
        Whole<C> at[WIDTH<C>];
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

// Whether x lies in a range, ends included; a NaN does not.
template <class C> INLINED inline Int<C> within(Real<C> x, C low, C high) { return clamp<C>(x, low, high) == x; }

// dx of x. FROM_ZERO: behind a ReLU, of a range that begins at zero.
template <bool FROM_ZERO, class C>
INLINED inline Real<C> input_gradient(int ste, Real<C> dy, Real<C> x, Int<C> inside) {
    if (ste == CLIP) return where<C>(FROM_ZERO ? inside & (x > C(0)) : inside, dy);
    return FROM_ZERO ? where<C>(~(x <= C(0)), dy) : dy;
}

template <class C, bool FROM_ZERO> struct Uniform {
    static constexpr bool RELU = FROM_ZERO;                    // does the ReLU before it, too
    static constexpr bool SMALL = true;                        // is copied, to lie in registers
    Rule rule;
    C step, shift = rule.shift, low = rule.low + shift, high = rule.high + shift;
    Real<C> error{}, ends{};                                   // of what lies inside, of what the range's ends get

    Uniform(const Rule& rule, const Table<C>& table) : rule(rule), step(table.step) {}

    INLINED Real<C> level(Real<C> x) const {
        return (round_half_even<C>(clamp<C>(x / step - shift, rule.low, rule.high)) + shift) * step;
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> dy) {
        const Real<C> at = x / step, kept = clamp<C>(at, low, high);
        const Int<C> inside = kept == at;
        if (rule.reduction != NO_SUMS) {
            const Real<C> nearest = round_half_even<C>(kept - shift) + shift;
            add_where(error, inside, (nearest - at) * dy);
            add_where(ends, (kept < at) | (kept > at), nearest * dy);  // a NaN gets nothing
        }
        return input_gradient<FROM_ZERO, C>(rule.ste, dy, x, inside);
    }
    void add_to(double* total) const {
        if (rule.reduction == NO_SUMS) return;
        for (int j = 0; j < WIDTH<C>; j++) total[1] += error[j], total[2] += ends[j];
    }
};

// Slots of the sums: 0 below the range, the last of (gaps or cells) + 2 above it; PER_CELL has as many again for the
// moments.
int slots_of(const Rule& rule) {
    switch (rule.reduction) {
        case NO_SUMS: return 0;
        case TOTAL: return 3;
        case PER_GAP: return rule.thresholds + 2;
        default: return 2 * (rule.thresholds + rule.segments + 2);
    }
}

// What lies below and above the range, and inside: sums of what lies above each level, whose differences are the gaps'.
template <class C, int GAPS>
void add_gaps(double* total, Real<C> below, Real<C> above, const Real<C> (&sums)[GAPS]) {
    for (int j = 0; j < WIDTH<C>; j++) {
        total[0] += below[j], total[GAPS + 1] += above[j];
        for (int k = 0; k < GAPS; k++) total[k + 1] += sums[k][j] - (k + 1 < GAPS ? double(sums[k + 1][j]) : 0);
    }
}

// Sums in one accumulator for each of GAPS gaps, or in one for all of them (GAPS = 1). Those of single gaps add up what
// lies above each level, which is one comparison where "in this gap" is two.
template <class C, int COUNT, int GAPS, bool FROM_ZERO> struct Masked {
    static constexpr bool RELU = FROM_ZERO, SMALL = true;
    Rule rule;
    const Table<C>* table;
    C low = FROM_ZERO ? 0 : table->levels[0], high = table->levels[table->count];
    Real<C> below{}, above{}, sums[GAPS] = {};

    Masked(const Rule& rule, const Table<C>& table) : rule(rule), table(&table) {}

    INLINED Real<C> level(Real<C> x) const {
        Int<C> unused;
        return look_up<COUNT, false, true>(*table, x, unused);
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> dy) {
        const Int<C> inside = within<C>(x, low, high);
        if (rule.reduction != NO_SUMS) {
            Int<C> unused;
            const Real<C> y = look_up<COUNT, false, false>(*table, x, unused), error = where<C>(inside, (y - x) * dy);
            if (!FROM_ZERO) add_where(below, x < low, dy);
            add_where(above, x > high, dy);
            sums[0] += error;
#pragma GCC unroll 15
            for (int k = 1; k < GAPS; k++) add_where(sums[k], x > all<C>(table->levels[k]), error);
        }
        return input_gradient<FROM_ZERO, C>(rule.ste, dy, x, inside);
    }
    void add_to(double* total) const {
        if (rule.reduction != NO_SUMS) add_gaps<C>(total, below, above, sums);
    }
};

// What lies inside the range, put aside until there are many vectors of it: half of what a folded ReLU gets does not.
template <class C> struct Aside {
    static constexpr int ROOM = 1024;
    C xs[ROOM + WIDTH<C>], dys[ROOM + WIDTH<C>];
    int waiting = 0;

    template <class F> INLINED void put(Real<C> x, Real<C> dy, Int<C> inside, F add) {
        store(xs + waiting, pack<C>(x, inside));
        store(dys + waiting, pack<C>(dy, inside));
        waiting += lanes_in<C>(inside);
        if (waiting >= ROOM) {
            add(ROOM);
            waiting -= ROOM;
            store(xs, load(xs + ROOM));
            store(dys, load(dys + ROOM));
        }
    }
    template <class F> void put_rest(C inside, F add) {        // a zero gradient adds nothing
        store(xs + waiting, all<C>(inside));
        store(dys + waiting, Real<C>{});
        add(waiting);
        waiting = 0;
    }
};

// As Masked, of what was put aside: so many accumulators are worth it where half lies outside, as behind a ReLU.
template <class C, int COUNT, bool FROM_ZERO> struct Packed {
    static constexpr bool RELU = FROM_ZERO, SMALL = false;
    const Rule& rule;
    const Table<C>& table;
    const C low = FROM_ZERO ? 0 : table.levels[0], high = table.levels[COUNT];
    Aside<C> aside;
    Real<C> above{}, sums[COUNT] = {};

    Packed(const Rule& rule, const Table<C>& table) : rule(rule), table(table) {}

    INLINED Real<C> gradient(Real<C> x, Real<C> dy) {
        add_where(above, x > high, dy);                        // no gap gets anything of what lies below zero
        aside.put(x, dy, (x > low) & (x <= high), [&](int count) { add_waiting(count); });
        return input_gradient<FROM_ZERO, C>(rule.ste, dy, x, within<C>(x, low, high));
    }
    __attribute__((noinline)) void add_waiting(int count) {    // all registers are for its sums
        Real<C> own[COUNT];
        std::copy(sums, sums + COUNT, own);
        for (int i = 0; i < count; i += WIDTH<C>) {
            const Real<C> x = load(aside.xs + i);
            Int<C> unused;
            const Real<C> error = (look_up<COUNT, false, false>(table, x, unused) - x) * load(aside.dys + i);
            own[0] += error;
#pragma GCC unroll 15
            for (int k = 1; k < COUNT; k++) add_where(own[k], x > all<C>(table.levels[k]), error);
        }
        std::copy(own, own + COUNT, sums);
    }
    void add_to(double* total) {
        aside.put_rest(high, [&](int count) { add_waiting(count); });
        add_gaps<C>(total, Real<C>{}, above, sums);
    }
};

// Sums at their slots: every lane has a column of its own, so that lanes do not wait for each other.
template <class C, int COUNT, Reduction REDUCTION> struct Scattered {
    static constexpr bool RELU = false, SMALL = false;
    static constexpr int SLOTS = REDUCTION == PER_GAP ? (COUNT ? COUNT + 2 : MOST + 2) : 2 * (2 * MOST + 2);
    const Rule& rule;
    const Table<C>& table;
    const C low = table.levels[0], high = table.levels[table.count], width = (high - low) / std::max(1, rule.segments);
    const int slots = slots_of(rule), ends = REDUCTION == PER_GAP ? slots : slots / 2, above_all = ends - 1;
    Aside<C> aside;
    C columns[WIDTH<C>][SLOTS];
    Whole<C> at[Aside<C>::ROOM + WIDTH<C>];
    Real<C> below{}, lowest{}, above{};

    Scattered(const Rule& rule, const Table<C>& table) : rule(rule), table(table) {
        for (auto& each : columns) std::fill(each, each + slots, C(0));
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> dy) {
        add_where(below, x < low, dy);
        if (REDUCTION == PER_CELL) add_where(lowest, x == low, dy);
        add_where(above, x > high, dy);
        aside.put(x, dy, (x > low) & (x <= high), [&](int count) { add_waiting(count); });
        return input_gradient<false, C>(rule.ste, dy, x, within<C>(x, low, high));
    }
    void add_waiting(int count) {
        C *xs = aside.xs, *dys = aside.dys;
        for (int i = 0; i < count; i += WIDTH<C>) {
            Real<C> x = load(xs + i), dy = load(dys + i);
            Int<C> slot;
            Real<C> y = look_up<COUNT, true, false>(table, x, slot);
            if constexpr (REDUCTION == PER_GAP) {
                slot -= x > y;
                store(dys + i, (y - x) * dy);
            } else {
                Int<C> number = __builtin_convertvector(clamp<C>((x - low) / width, 0, rule.segments - 1), Int<C>);
                slot += number + 1;
                store(xs + i, (x - (low + __builtin_convertvector(number, Real<C>) * width)) * dy);
            }
            store(at + i, slot);
        }
        add_at_slots(dys, 0, count);
        if (REDUCTION == PER_CELL) add_at_slots(xs, ends, count);
    }
    void add_at_slots(const C* values, int first, int count) {
        for (int i = 0; i < count; i += WIDTH<C>)
#pragma GCC unroll 16
            for (int j = 0; j < WIDTH<C>; j++) columns[j][first + at[i + j]] += values[i + j];
    }
    void add_to(double* total) {
        aside.put_rest(low, [&](int count) { add_waiting(count); });
        for (int j = 0; j < WIDTH<C>; j++) {
            for (int s = 0; s < slots; s++) total[s] += columns[j][s];
            total[0] += below[j], total[1] += lowest[j], total[above_all] += above[j];
        }
    }
};

// dx alone, which depends on the ends of the range only.
template <class C, bool UNIFORM, bool FROM_ZERO> struct Ends {
    static constexpr bool RELU = FROM_ZERO;
    int ste;
    C step, low, high;

    Ends(const Rule& rule, const Table<C>& table) : ste(rule.ste), step(table.step) {
        low = UNIFORM ? C(rule.low + rule.shift) : table.levels[0];
        high = UNIFORM ? C(rule.high + rule.shift) : table.levels[table.count];
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> dy) const {
        const Real<C> at = UNIFORM ? x / step : x;
        return input_gradient<FROM_ZERO, C>(ste, dy, x, within<C>(at, low, high));
    }
};

}  // namespace
