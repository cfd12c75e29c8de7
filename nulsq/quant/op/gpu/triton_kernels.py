"""The kernels of the GPU form, in Triton. oracle.py defines what is computed, gpu.py calls them.

Tensors are walked in tiles of ROWS x COLS elements, as `tiles` in gpu.py lays them out: along dimension 0 of the grid
(`lane`) lie the channels of a table, or of x behind a batch norm. A program takes every `programs`-th tile of its lane,
so its sums stay in registers, an accumulator for each slot and place in the tile, until its last tile: then each slot
is added up once and stored for itself, and `finish` adds up the programs. No atomics: the same bits every time.

Slots of the sums: 0 below the range, the last above it. Between them, for "total", all that lies inside; for "per_gap"
slot k has what lies inside above level k - 1, gap k and all gaps further up, and `finish` takes the differences: a
comparison and an addition under a predicate for each, where the gap's number would have to be found first. For
"per_cell" slot k has cell k.

Everything static is a constexpr: which thresholds take ties upward is a bit mask, loops over levels are unrolled, and
table and lines are read before the tiles, since a store could change what is read again. Division is div_rn where it
decides a level: Triton's own / on float32 is an approximation.
"""

import triton
import triton.language as tl

from nulsq.quant.op.gpu.triton_parts import clamp, divide, line, lines, look_up, place, read, relu, round_half_even


@triton.jit
def quantize(x_from, y_to, gaps, levels, thresholds, center, scale, shift, tiles, rows, cols, row_stride, lane_stride,
             features,
             UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
             RELU: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr, LINES: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):
    if LINES == "none":
        gaps += tl.program_id(0)
        levels += tl.program_id(0) * (COUNT + 1)
        thresholds += tl.program_id(0) * COUNT
    else:
        middle, slope, rise = lines(center, scale, shift, features, LINES, COLS)
    if UNIFORM:
        step = tl.load(gaps)
    else:
        its_levels = read(levels, COUNT + 1)
        its_thresholds = read(thresholds, COUNT)

    for number in range(tl.program_id(1), tiles, tl.num_programs(1)):
        at, there = place(number, rows, cols, row_stride, lane_stride, features, LINES, ROWS, COLS)
        x = tl.load(x_from + at, there, other=0).to(KIND)
        if LINES != "none":
            x = x * slope + rise
        if RELU:
            x = relu(x)
        if UNIFORM:
            code = round_half_even(clamp(divide(x, step + tl.zeros_like(x)) - SHIFT, LOW, HIGH))
            y = (code + SHIFT) * step
        else:
            y, index = look_up(x, its_levels, its_thresholds, COUNT, TIES, DEPTH)
            y = tl.where(x == x, y, x)
        tl.store(y_to + at, y.to(y_to.dtype.element_ty), there)


@triton.jit
def _passed(x, dy, step, low, high, UNIFORM: tl.constexpr, RELU: tl.constexpr, STE: tl.constexpr,
            FROM_ZERO: tl.constexpr):
    """x behind its ReLU, in the unit of low and high, and what the straight-through estimator passes of dy."""
    if RELU:
        x = relu(x)
        dy = tl.where(x != 0, dy, 0.0)
    if UNIFORM:
        x = divide(x, step)
    if STE == "none":
        return x, dy
    return x, tl.where((x <= high) if FROM_ZERO else (x >= low) & (x <= high), dy, 0.0)


@triton.jit
def gradients(x_from, dy_from, dx_to, partial, line_partial, gaps, levels, thresholds, center, scale, shift, tiles,
              rows, cols, row_stride, lane_stride, features,
              UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
              RELU: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr, STE: tl.constexpr,
              REDUCTION: tl.constexpr, SEGMENTS: tl.constexpr, SLOTS: tl.constexpr, FROM_ZERO: tl.constexpr,
              KIND: tl.constexpr, LINES: tl.constexpr, TWICE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dx, unless a second pass makes it (`passed_on`), and the sums of this program: partial [lanes, programs, SLOTS],
    twice as many slots for per_cell; line_partial [programs, 2, features]: of scale and of shift.
    """
    lane = tl.program_id(0)
    nothing = tl.zeros((ROWS, COLS), KIND)
    if LINES == "none":
        gaps += lane
        levels += lane * (COUNT + 1)
        thresholds += lane * COUNT
    else:
        middle, slope, rise = lines(center, scale, shift, features, LINES, COLS)
    turned = nothing
    moved = nothing
    step = tl.load(gaps) + nothing
    if UNIFORM:
        low = LOW + SHIFT + nothing
        high = HIGH + SHIFT + nothing
    else:
        its_levels = read(levels, COUNT + 1)
        its_thresholds = read(thresholds, COUNT)
        low = its_levels[0] + nothing
        high = its_levels[COUNT] + nothing
    sums = ()
    moments = ()
    for _ in tl.static_range(SLOTS):
        sums = sums + (nothing,)
        if REDUCTION == "per_cell":
            moments = moments + (nothing,)

    for number in range(tl.program_id(1), tiles, tl.num_programs(1)):
        at, there = place(number, rows, cols, row_stride, lane_stride, features, LINES, ROWS, COLS)
        taken = tl.load(x_from + at, there, other=0).to(KIND)
        dy = tl.load(dy_from + at, there, other=0).to(KIND)
        x = taken
        if LINES != "none":
            x = taken * slope + rise
        x, dx = _passed(x, dy, step, low, high, UNIFORM, RELU, STE, FROM_ZERO)
        if LINES != "none":
            turned += dx * (taken - middle)
            moved += dx
            dx *= slope
        if not TWICE:
            tl.store(dx_to + at, dx.to(dx_to.dtype.element_ty), there)

        if REDUCTION != "none":
            if UNIFORM:
                y = round_half_even(clamp(x, low, high) - SHIFT) + SHIFT
            else:
                y, index = look_up(x, its_levels, its_thresholds, COUNT, TIES, DEPTH)
            inside = (x <= high) if FROM_ZERO else (x >= low) & (x <= high)
            if REDUCTION == "per_cell":
                width = divide(high - low, SEGMENTS + nothing)
                segment = tl.where(inside, clamp(divide(x - low, width), 0, SEGMENTS - 1), 0.0).to(tl.int32)
                slot = index + segment + 1
                value = tl.where(inside, dy, 0.0)
                moment = tl.where(inside, dy * (x - (low + segment.to(KIND) * width)), 0.0)
            else:
                value = tl.where(inside, (y - x) * dy, 0.0)
            new = (sums[0] if FROM_ZERO else tl.where(x < low, sums[0] + dy, sums[0]),)
            for k in tl.static_range(1, SLOTS - 1):
                if REDUCTION == "total":
                    new = new + (sums[k] + value,)
                elif REDUCTION == "per_gap":
                    new = new + (tl.where(x > its_levels[k - 1], sums[k] + value, sums[k]),)
                else:
                    new = new + (tl.where(slot == k, sums[k] + value, sums[k]),)
            sums = new + (tl.where(x > high, sums[SLOTS - 1] + dy, sums[SLOTS - 1]),)
            if REDUCTION == "per_cell":
                new = (moments[0],)
                for k in tl.static_range(1, SLOTS):
                    new = new + (tl.where(slot == k, moments[k] + moment, moments[k]),)
                moments = new

    if REDUCTION != "none":
        numbers: tl.constexpr = 2 * SLOTS if REDUCTION == "per_cell" else SLOTS
        partial += (lane.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * numbers
        for k in tl.static_range(SLOTS):
            tl.store(partial + k, tl.sum(sums[k]))
            if REDUCTION == "per_cell":
                tl.store(partial + SLOTS + k, tl.sum(moments[k]))
    if LINES != "none":
        line_partial += tl.program_id(1).to(tl.int64) * 2 * features
        if LINES == "last":
            channel = lane * COLS + tl.arange(0, COLS)
            tl.store(line_partial + channel, tl.sum(turned, 0), channel < features)
            tl.store(line_partial + features + channel, tl.sum(moved, 0), channel < features)
        else:
            tl.store(line_partial + lane, tl.sum(turned))
            tl.store(line_partial + features + lane, tl.sum(moved))


@triton.jit
def passed_on(x_from, dy_from, dx_to, gaps, levels, center, scale, shift, inverse, dscale, dshift, tiles,
              rows, cols, row_stride, lane_stride, features, count,
              UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
              RELU: tl.constexpr, STE: tl.constexpr, FROM_ZERO: tl.constexpr, KIND: tl.constexpr, LINES: tl.constexpr,
              ROWS: tl.constexpr, COLS: tl.constexpr):
    """dx once all sums are known, with what goes through a batch's own statistics, where center
    is the mean of `count` elements and scale is weight times inverse = 1 / sqrt(variance + eps):
    d inverse / d x = -inverse^3 (x - mean) / count,  d mean / d x = 1 / count.
    """
    middle, slope, rise = lines(center, scale, shift, features, LINES, COLS)
    share = slope / tl.full((1, 1), count, KIND)
    bent = line(inverse, features, LINES, COLS)
    bent = -line(dscale, features, LINES, COLS) * share * bent * bent
    moved = -line(dshift, features, LINES, COLS) * share
    nothing = tl.zeros((ROWS, COLS), KIND)
    step = tl.load(gaps) + nothing
    if UNIFORM:
        low = LOW + SHIFT + nothing
        high = HIGH + SHIFT + nothing
    else:
        low = tl.load(levels) + nothing
        high = tl.load(levels + COUNT) + nothing

    for number in range(tl.program_id(1), tiles, tl.num_programs(1)):
        at, there = place(number, rows, cols, row_stride, lane_stride, features, LINES, ROWS, COLS)
        taken = tl.load(x_from + at, there, other=0).to(KIND)
        dy = tl.load(dy_from + at, there, other=0).to(KIND)
        x, dx = _passed(taken * slope + rise, dy, step, low, high, UNIFORM, RELU, STE, FROM_ZERO)
        dx *= slope
        dx += (taken - middle) * bent + moved
        tl.store(dx_to + at, dx.to(dx_to.dtype.element_ty), there)


@triton.jit
def _finish_table(table, partial, gaps, levels, dgaps, doffset, dslope, programs,
                  UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr,
                  COUNT: tl.constexpr, NEGATIVE: tl.constexpr, REDUCTION: tl.constexpr, SLOTS: tl.constexpr,
                  WIDE: tl.constexpr, AT_ONCE: tl.constexpr):
    numbers: tl.constexpr = 2 * SLOTS if REDUCTION == "per_cell" else SLOTS
    slot = tl.arange(0, WIDE)
    sums = tl.zeros((AT_ONCE, WIDE), tl.float64)
    further = tl.zeros((AT_ONCE, WIDE), tl.float64)  # per_gap: what lies above the next level
    for start in range(0, programs, AT_ONCE):
        program = start + tl.arange(0, AT_ONCE)[:, None]
        at = partial + (table.to(tl.int64) * programs + program) * numbers + slot[None, :]
        sums += tl.load(at, (program < programs) & (slot[None, :] < numbers), other=0).to(tl.float64)
        if REDUCTION == "per_gap":
            further += tl.load(at + 1, (program < programs) & (slot[None, :] < SLOTS - 2), other=0).to(tl.float64)
    total = tl.sum(sums, 0)
    below = tl.sum(tl.where(slot == 0, total, 0.0))
    above = tl.sum(tl.where(slot == SLOTS - 1, total, 0.0))
    within = (slot > 0) & (slot < SLOTS - 1)
    at = table * (SLOTS - 2) + slot - 1
    if REDUCTION == "per_gap":
        found = (total - tl.sum(further, 0)) / tl.load(gaps + at, within, other=1).to(tl.float64)
        found += tl.where(slot <= NEGATIVE, -below, above)  # an end is the sum of the gaps from zero to there
        tl.store(dgaps + at, found.to(dgaps.dtype.element_ty), within)
    else:
        unit = tl.load(gaps + table).to(tl.float64)
        if UNIFORM:
            found = (LOW + SHIFT) * below + (HIGH + SHIFT) * above
        else:
            levels += table * (COUNT + 1)
            found = (tl.load(levels).to(tl.float64) * below + tl.load(levels + COUNT).to(tl.float64) * above) / unit
        if REDUCTION == "total":
            inside = tl.sum(tl.where(slot == 1, total, 0.0))
            found += inside if UNIFORM else inside / unit  # a uniform grid's errors are in steps already
        else:
            tl.store(doffset + at, total.to(doffset.dtype.element_ty), within)
            tl.store(dslope + at - SLOTS, total.to(dslope.dtype.element_ty), (slot > SLOTS) & (slot < 2 * SLOTS - 1))
        tl.store(dgaps + table, found.to(dgaps.dtype.element_ty))


@triton.jit
def _finish_lines(number, line_partial, dscale, dshift, programs, features, AT_ONCE: tl.constexpr, COLS: tl.constexpr):
    channel = number * COLS + tl.arange(0, COLS)
    turned = tl.zeros((AT_ONCE, COLS), tl.float64)
    moved = tl.zeros((AT_ONCE, COLS), tl.float64)
    for start in range(0, programs, AT_ONCE):
        program = start + tl.arange(0, AT_ONCE)[:, None]
        at = line_partial + program * 2 * features + channel[None, :]
        there = (program < programs) & (channel[None, :] < features)
        turned += tl.load(at, there, other=0).to(tl.float64)
        moved += tl.load(at + features, there, other=0).to(tl.float64)
    tl.store(dscale + channel, tl.sum(turned, 0).to(dscale.dtype.element_ty), channel < features)
    tl.store(dshift + channel, tl.sum(moved, 0).to(dshift.dtype.element_ty), channel < features)


@triton.jit
def finish(partial, line_partial, gaps, levels, dgaps, doffset, dslope, dscale, dshift, tables, programs, line_programs,
           features,
           UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
           NEGATIVE: tl.constexpr, REDUCTION: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
           AT_ONCE: tl.constexpr, LINE_COLS: tl.constexpr):
    """Gradients from the sums of all programs, in double: what the ends get may be large and cancel. One program for
    each table, then one for every LINE_COLS of the lines.
    """
    task = tl.program_id(0)
    if REDUCTION != "none":  # noqa: SIM102 -- static: what is not there is not compiled
        if task < tables:
            _finish_table(task, partial, gaps, levels, dgaps, doffset, dslope, programs, UNIFORM, LOW, HIGH, SHIFT,
                          COUNT, NEGATIVE, REDUCTION, SLOTS, WIDE, AT_ONCE)
    if LINE_COLS:  # noqa: SIM102
        if task >= tables:
            _finish_lines(task - tables, line_partial, dscale, dshift, line_programs, features, AT_ONCE, LINE_COLS)
