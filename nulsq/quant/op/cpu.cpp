// The CPU form of the fake-quantize operation: one pass over memory forward, one backward with all sums in it.
//
// oracle.py defines what is computed; cpu.py compiles this file and calls it. Written with the vector types that GCC
// and Clang share: one text for AVX2, AVX-512 and NEON. What makes it quick:
//
//   index     up to CHAIN thresholds: compare and select, a few instructions for a whole vector. 15 thresholds, and 7
//             where a vector holds 16 numbers, by halves, with vectors as tables. More: equal buckets say how many
//             thresholds lie below x's bucket, and only those inside it are compared. x and thresholds go to buckets
//             by one rounded, monotone function, so the answer is exact.
//   ties      x >= t is x > the float just below t: one kind of comparison for both.
//   relu      of a range that begins at zero, folded into its comparisons: FROM_ZERO.
//   sums      up to MASKED gaps: an accumulator each. Else what lies inside the range is put aside, packed, and each
//             lane adds it at its slot in a column of its own, many vectors later: what was stored as a vector a
//             moment ago is slow to read as numbers.
//   order     pieces of PIECE elements are summed in the type of computation, the pieces in double and in order: the
//             same numbers for any number of threads.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"
#include "lines.h"
#include "table.h"

namespace {

template <class C> constexpr int MASKED = WIDTH<C> > 8 ? 15 : 7;  // gaps with an accumulator each

template <class C> constexpr bool by_halves(int count) {
    return count == 15 ? PICKS<C> > 0 : count == 7 && PICKS<C> > 8;
}

// Level and, where WITH_INDEX, level index of a vector; a NaN stays one, with index 0. COUNT thresholds, 0: any number.
template <int COUNT, bool WITH_INDEX, class C>
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
        return x == x ? load(level) : x;
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
        return x == x ? y : x;
    }
    Real<C> y = x == x ? all<C>(table.levels[0]) : x;
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

// dx of x, which lies `at` on the scale of the range's ends. FROM_ZERO: behind a ReLU, of a range that begins at zero.
template <bool FROM_ZERO, class C>
INLINED inline Real<C> input_gradient(int ste, Real<C> dy, Real<C> x, Real<C> at, C low, C high) {
    if (FROM_ZERO && ste == CLIP) return where<C>(x > C(0), where<C>(at <= high, dy));
    if (FROM_ZERO) return where<C>(~(x <= C(0)), input_gradient<false>(ste, dy, x, at, low, high));
    if (ste == PASS_ALL) return dy;
    if (ste == CLIP) return where<C>(at >= low, where<C>(at <= high, dy));
    Real<C> open = where<C>(at > low, where<C>(at < high, dy));
    return ste == CLIP_OPEN ? open : open + where<C>((at == low) | (at == high), dy * C(0.5));
}

// ---- what is done with one vector of a piece, by kind of quantizer

template <class C, bool FROM_ZERO> struct Uniform {
    static constexpr bool RELU = FROM_ZERO;                    // does the ReLU before it, too
    static constexpr bool SMALL = true;                        // is copied, to lie in registers
    Rule rule;
    C step, shift = rule.shift, low = rule.low + shift, high = rule.high + shift;
    Real<C> below{}, error{}, above{};

    Uniform(const Rule& rule, const Table<C>& table) : rule(rule), step(table.step) {}

    INLINED Real<C> level(Real<C> x) const {
        return (round_half_even<C>(clamp<C>(x / step - shift, rule.low, rule.high)) + shift) * step;
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> dy) {
        const Real<C> at = x / step;
        if (rule.reduction != NO_SUMS) {
            const Real<C> nearest = round_half_even<C>(clamp<C>(at, low, high) - shift) + shift;
            if (!FROM_ZERO) add_where(below, at < low, dy);
            add_where(error, FROM_ZERO ? x > C(0) : at >= low, where<C>(at <= high, (nearest - at) * dy));
            add_where(above, at > high, dy);
        }
        return input_gradient<FROM_ZERO>(rule.ste, dy, x, at, low, high);
    }
    void add_to(double* total) const {
        if (rule.reduction == NO_SUMS) return;
        for (int j = 0; j < WIDTH<C>; j++) total[0] += below[j], total[1] += error[j], total[2] += above[j];
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

// Sums in one accumulator for each of GAPS gaps, or in one for all of them (GAPS = 1). Those of single gaps add up what
// lies above each level, which is one comparison where "in this gap" is two; their differences are the gaps'.
template <class C, int COUNT, int GAPS, bool FROM_ZERO> struct Masked {
    static constexpr bool RELU = FROM_ZERO, SMALL = true;
    Rule rule;
    const Table<C>* table;
    C low = table->levels[0], high = table->levels[table->count];
    Real<C> below{}, above{}, sums[GAPS] = {};

    Masked(const Rule& rule, const Table<C>& table) : rule(rule), table(&table) {}

    INLINED Real<C> level(Real<C> x) const {
        Int<C> unused;
        return look_up<COUNT, false>(*table, x, unused);
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> dy) {
        if (rule.reduction != NO_SUMS) {
            Int<C> unused;
            Real<C> y = look_up<COUNT, false>(*table, x, unused), error = (y - x) * dy;
            if (!FROM_ZERO) add_where(below, x < low, dy);
            add_where(above, x > high, dy);
            error = where<C>(x <= high, error);
            add_where(sums[0], FROM_ZERO ? x > low : x >= low, error);
#pragma GCC unroll 15
            for (int k = 1; k < GAPS; k++) add_where(sums[k], x > all<C>(table->levels[k]), error);
        }
        return input_gradient<FROM_ZERO>(rule.ste, dy, x, x, low, high);
    }
    void add_to(double* total) const {
        if (rule.reduction == NO_SUMS) return;
        for (int j = 0; j < WIDTH<C>; j++) {
            total[0] += below[j], total[GAPS + 1] += above[j];
            for (int k = 0; k < GAPS; k++) total[k + 1] += sums[k][j] - (k + 1 < GAPS ? double(sums[k + 1][j]) : 0);
        }
    }
};

// Sums at their slots: every lane has a column of its own, so that lanes do not wait for each other. What lies inside
// the range is put aside first, packed, then looked up and added in full vectors: half of what a folded ReLU gets does
// not.
template <class C, int COUNT, Reduction REDUCTION> struct Scattered {
    static constexpr bool RELU = false, SMALL = false;
    static constexpr int SLOTS = REDUCTION == PER_GAP ? (COUNT ? COUNT + 2 : MOST + 2) : 2 * (2 * MOST + 2);
    static constexpr int ROOM = 1024;
    const Rule& rule;
    const Table<C>& table;
    const C low = table.levels[0], high = table.levels[table.count], width = (high - low) / std::max(1, rule.segments);
    const int slots = slots_of(rule), ends = REDUCTION == PER_GAP ? slots : slots / 2, above_all = ends - 1;
    C columns[WIDTH<C>][SLOTS], xs[ROOM + WIDTH<C>], dys[ROOM + WIDTH<C>];
    Whole<C> at[ROOM + WIDTH<C>];
    Real<C> below{}, lowest{}, above{};
    int waiting = 0;

    Scattered(const Rule& rule, const Table<C>& table) : rule(rule), table(table) {
        for (auto& each : columns) std::fill(each, each + slots, C(0));
    }
    INLINED Real<C> gradient(Real<C> x, Real<C> dy) {
        const Int<C> inside = (x > low) & (x <= high);
        add_where(below, x < low, dy);
        if (REDUCTION == PER_CELL) add_where(lowest, x == low, dy);
        add_where(above, x > high, dy);
        store(xs + waiting, pack<C>(x, inside));
        store(dys + waiting, pack<C>(dy, inside));
        waiting += lanes_in<C>(inside);
        if (waiting >= ROOM) {
            add_waiting(ROOM);
            waiting -= ROOM;
            store(xs, load(xs + ROOM));
            store(dys, load(dys + ROOM));
        }
        return input_gradient<false>(rule.ste, dy, x, x, low, high);
    }
    void add_waiting(int count) {
        for (int i = 0; i < count; i += WIDTH<C>) {
            Real<C> x = load(xs + i), dy = load(dys + i);
            Int<C> slot;
            Real<C> y = look_up<COUNT, true>(table, x, slot);
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
        store(xs + waiting, all<C>(low));
        store(dys + waiting, Real<C>{});
        add_waiting(waiting);
        for (int j = 0; j < WIDTH<C>; j++) {
            for (int s = 0; s < slots; s++) total[s] += columns[j][s];
            total[0] += below[j], total[1] += lowest[j], total[above_all] += above[j];
        }
    }
};

// y (FORWARD) or dx and the sums of one piece, the elements from `start` on.
template <bool FORWARD, class Kind, class S, class C>
void piece(const Rule& rule, const Table<C>& table, const Lines<C>& lines, int64_t start, int64_t count, const S* x,
           const S* dy, S* out, double* total, double* line_total) {
    Kind kind(rule, table);
    const bool relu = rule.relu && !Kind::RELU;
    const Real<C> floor = all<C>(relu ? C(0) : std::numeric_limits<C>::quiet_NaN());  // nothing is below a NaN
    auto found = [=](auto& kind, Real<C> at, const S* dy) INLINED {  // y or dx
        if (!Kind::RELU) at = at <= floor ? floor : at;
        if constexpr (FORWARD) return kind.level(at);
        else {
            const Real<C> dx = kind.gradient(at, load(dy));
            return Kind::RELU ? dx : at == floor ? Real<C>{} : dx;
        }
    };
    if (!lines.features) {
        auto step = [&](const S* x, const S* dy, S* out) INLINED {
            const Real<C> given = found(kind, load(x), dy);
            if (out) store(out, given);
        };
        const int64_t rest = count % WIDTH<C>, full = count - rest;
        vectors<FORWARD, C>(x, dy, out, count / WIDTH<C>, WIDTH<C>, WIDTH<C>, step);
        if (rest) vectors<FORWARD, C>(x + full, along(dy, full), along(out, full), 1, WIDTH<C>, rest, step);
    } else {
        lines.stretches(start, count, [&](int64_t i, int64_t repeat, int64_t stride, int64_t lanes, int64_t channel) {
            const Real<C> center = lines.of(lines.center, channel), scale = lines.of(lines.scale, channel),
                          shift = lines.of(lines.shift, channel) - center * scale;
            Real<C> turned{}, moved{};                         // what the lines' scale and shift get
            std::conditional_t<Kind::SMALL, Kind, Kind&> own = kind;
            auto step = [&](const S* x, const S* dy, S* out) INLINED {
                const Real<C> taken = load(x), given = found(own, taken * scale + shift, dy);
                if constexpr (FORWARD) store(out, given);
                else {
                    turned += given * (taken - center);
                    moved += given;
                    if (out) store(out, given * scale);
                }
            };
            vectors<FORWARD, C>(x + i, along(dy, i), along(out, i), repeat, stride, lanes, step);
            if constexpr (!FORWARD) {
                if constexpr (Kind::SMALL) kind = own;
                lines.add(line_total, channel, turned);
                lines.add(line_total + lines.features, channel, moved);
            }
        });
    }
    if constexpr (!FORWARD) kind.add_to(total);
}

template <bool FORWARD, class S, class C, int COUNT, bool FROM_ZERO> auto choose_kind(const Rule& rule) {
    if constexpr (!FORWARD) {
        constexpr bool few = COUNT > 0 && COUNT <= MASKED<C>;
        if (few && rule.reduction == PER_GAP) return piece<FORWARD, Masked<C, COUNT, few ? COUNT : 1, FROM_ZERO>, S, C>;
        if (rule.reduction == PER_GAP) return piece<FORWARD, Scattered<C, COUNT, PER_GAP>, S, C>;
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
    const Lines<C> lines(call);
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
    by_pieces(call, lines, [&](int64_t task, int64_t start, int64_t count) {
        const int64_t c = task / pieces, at = c * elements + start;
        work(rule, tables[c], lines, start, count, x + at, along(dy, at), along(out, at),
             partial.data() + task * slots, line_partial.data() + task * line_slots);
    });
    for (int64_t s = 0; s < line_slots; s++) {
        double total = 0;
        for (int64_t piece = 0; piece < pieces; piece++) total += line_partial[piece * line_slots + s];
        if (s < call.features) ((C*)call.dscale)[s] = total;
        else ((C*)call.dshift)[s - call.features] = total;
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
        const double unit = gaps[c], low = rule.uniform ? rule.low + rule.shift : tables[c].levels[0] / unit,
                     high = rule.uniform ? rule.high + rule.shift : tables[c].levels[rule.thresholds] / unit;
        dgaps[c] = low * below + high * above;
        if (rule.reduction == TOTAL) dgaps[c] += rule.uniform ? total[1] : total[1] / unit;  // in steps already
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
FOR_EACH_STORAGE(nulsq_add_lines, add_lines)
FOR_EACH_STORAGE(nulsq_moments, moments)
