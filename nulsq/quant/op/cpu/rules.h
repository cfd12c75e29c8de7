// What a quantizer declares, as the kernels of cpu.cpp use it: `Rule` and `Table` of reference.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector.h"

namespace {

constexpr int CHAIN = 31;   // most thresholds that are compared one after the other
constexpr int MOST = 256;   // most levels

enum Ste { CLIP, PASS_ALL };                                   // kernel.py numbers them
enum Reduction { NO_SUMS, TOTAL, PER_GAP, PER_CELL };

struct Rule {
    int uniform, ste, reduction, low, high, segments, thresholds, relu;
    double shift;
};

// Step, or levels and thresholds, of one row of the table.
template <class C> struct Table {
    int count = 0;                                             // number of thresholds
    C step = 0, thresholds[MOST], levels[MOST];
    C buckets_per_unit = 0;                                    // of x
    int inside = 0;                                            // largest number of thresholds in a bucket
    std::vector<uint8_t> below;                                // thresholds below each bucket; empty: no buckets
    static constexpr int BUCKETS = 4 * MOST;
    Real<C> middle[3], low_levels, high_levels;                // for binary search: 7 or 15 thresholds

    Table() {}                                                 // does not initialize the arrays

    void read(const Rule& rule, const C* gaps, const C* all_levels, const C* all_thresholds, const uint8_t* ties_up) {
        step = gaps[0];
        count = rule.uniform ? 0 : rule.thresholds;
        for (int k = 0; k < count; k++) {
            C t = all_thresholds[k];
            thresholds[k] = ties_up[k] ? std::nextafter(t, -std::numeric_limits<C>::infinity()) : t;
        }
        for (int k = 0; k < count + (rule.uniform ? 0 : 1); k++) levels[k] = all_levels[k];
    }

    // middle[d]: the thresholds in the middle of the two, four or eight parts at depth d of the search. The levels are
    // in one vector if it holds all of them, else in two.
    void sort_into_halves() {
        const int half = (count + 1) / 2;
        for (int d = 0; 2 << d <= half; d++)
            for (int part = 0; part < 2 << d; part++)
                middle[d][part] = thresholds[(2 * part + 1) * (half >> (d + 1)) - 1];
        for (int k = 0; k < PICKS<C>; k++) {
            low_levels[k] = levels[std::min(k, count)];
            high_levels[k] = levels[std::min(PICKS<C> + k, count)];
        }
    }

    Int<C> bucket(Real<C> x) const {
        Real<C> at = (x - thresholds[0]) * buckets_per_unit;
        at = at > C(0) ? at : Real<C>{};                       // NaN goes to the first bucket
        at = at < C(BUCKETS - 1) ? at : all<C>(BUCKETS - 1);
        return __builtin_convertvector(at, Int<C>);
    }

    void sort_into_buckets() {
        below.resize(BUCKETS);
        buckets_per_unit = BUCKETS / (thresholds[count - 1] - thresholds[0]);
        if (!std::isfinite(buckets_per_unit)) buckets_per_unit = 0;
        thresholds[count] = std::numeric_limits<C>::infinity();
        int k = 0;
        for (int b = 0; b < BUCKETS; b++) {
            below[b] = uint8_t(k);
            int first = k;
            while (k < count && bucket(all<C>(thresholds[k]))[0] == b) k++;
            inside = std::max(inside, k - first);
        }
    }
};

}  // namespace
