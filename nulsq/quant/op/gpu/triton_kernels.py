"""The kernels of the GPU form, in Triton. reference.py defines what is computed, kernel.py launches them.

A tensor is split into tiles of ROWS x COLS elements, as `tiles` in kernel.py describes. Dimension 0 of the grid
(`group`) runs over the rows of a table, or over the channels of x after a batch norm. A program takes every
`programs`-th tile of its group, so its sums stay in registers until its last tile, with an accumulator for each slot
and place in the tile. Then each slot is added up once and stored, and `finish` adds up the programs. There are no
atomic operations, so the result has the same bits every time.

Slots of the sums: 0 is below the range, the last above it. Between them, "total" has one slot for the whole range.
"per_gap" adds to slot k everything inside the range above level k - 1, that is gap k and all gaps above it, and
`finish` takes the differences: one comparison and one predicated addition, where the number of the gap would have to be
found first. "per_cell" adds to slot k what is in cell k.

All static values are constexpr: the thresholds whose ties go up are a bit mask, and loops over levels are unrolled.
Table and batch norm are read before the tiles, because a store could change what is read later. Division is div_rn
where it decides a level, since Triton's own / on float32 is an approximation.
"""

import triton
import triton.language as tl

from nulsq.quant.op.gpu.triton_parts import (
    clamp,
    divide,
    look_up,
    of_channels,
    place,
    read_norm,
    read_table,
    relu,
    round_half_even,
)


@triton.jit
def quantize(x_ptr, y_ptr, gaps_ptr, levels_ptr, thresholds_ptr, mean_ptr, scale_ptr, bias_ptr, tiles, rows, cols,
             row_stride, group_stride, channels,
             UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
             RELU: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):
    """y: the level of each element."""
    if LAYOUT == "flat":
        gaps_ptr += tl.program_id(0)
        levels_ptr += tl.program_id(0) * (COUNT + 1)
        thresholds_ptr += tl.program_id(0) * COUNT
    else:
        mean, scale, offset = read_norm(mean_ptr, scale_ptr, bias_ptr, channels, LAYOUT, COLS)
    if UNIFORM:
        step = tl.load(gaps_ptr)
    else:
        levels = read_table(levels_ptr, COUNT + 1)
        thresholds = read_table(thresholds_ptr, COUNT)

    for number in range(tl.program_id(1), tiles, tl.num_programs(1)):
        at, mask = place(number, rows, cols, row_stride, group_stride, channels, LAYOUT, ROWS, COLS)
        x = tl.load(x_ptr + at, mask, other=0).to(DTYPE)
        if LAYOUT != "flat":
            x = x * scale + offset
        if RELU:
            x = relu(x)
        if UNIFORM:
            code = round_half_even(clamp(divide(x, step + tl.zeros_like(x)) - SHIFT, LOW, HIGH))
            y = (code + SHIFT) * step
        else:
            y, index = look_up(x, levels, thresholds, COUNT, TIES, DEPTH)
            y = tl.where(x == x, y, x)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _straight_through(x, grad_output, step, low, high, UNIFORM: tl.constexpr, RELU: tl.constexpr, STE: tl.constexpr,
                      FROM_ZERO: tl.constexpr):
    """x after its ReLU, in the unit of low and high, and the part of grad_output that reaches it."""
    if RELU:
        x = relu(x)
        grad_output = tl.where(x != 0, grad_output, 0.0)
    if UNIFORM:
        x = divide(x, step)
    if STE == "none":
        return x, grad_output
    return x, tl.where((x <= high) if FROM_ZERO else (x >= low) & (x <= high), grad_output, 0.0)


@triton.jit
def gradients(x_ptr, grad_output_ptr, grad_input_ptr, partial, norm_partial, gaps_ptr, levels_ptr, thresholds_ptr,
              mean_ptr, scale_ptr, bias_ptr, tiles, rows, cols, row_stride, group_stride, channels,
              UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
              RELU: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr, STE: tl.constexpr,
              REDUCTION: tl.constexpr, SEGMENTS: tl.constexpr, SLOTS: tl.constexpr, FROM_ZERO: tl.constexpr,
              DTYPE: tl.constexpr, LAYOUT: tl.constexpr, SECOND_PASS: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr):
    """The gradient of x, unless a second pass (`norm_backward`) computes it, and the sums of this program.

    partial: [groups, programs, SLOTS], for per_cell twice as many slots. norm_partial: [programs, 2, channels], the
    sums for scale and bias.
    """
    group = tl.program_id(0)
    zeros = tl.zeros((ROWS, COLS), DTYPE)
    if LAYOUT == "flat":
        gaps_ptr += group
        levels_ptr += group * (COUNT + 1)
        thresholds_ptr += group * COUNT
    else:
        mean, scale, offset = read_norm(mean_ptr, scale_ptr, bias_ptr, channels, LAYOUT, COLS)
    grad_scale_sum = zeros
    grad_bias_sum = zeros
    step = tl.load(gaps_ptr) + zeros
    if UNIFORM:
        low = LOW + SHIFT + zeros
        high = HIGH + SHIFT + zeros
    else:
        levels = read_table(levels_ptr, COUNT + 1)
        thresholds = read_table(thresholds_ptr, COUNT)
        low = levels[0] + zeros
        high = levels[COUNT] + zeros
    sums = ()
    moments = ()
    for _ in tl.static_range(SLOTS):
        sums = sums + (zeros,)
        if REDUCTION == "per_cell":
            moments = moments + (zeros,)

    for number in range(tl.program_id(1), tiles, tl.num_programs(1)):
        at, mask = place(number, rows, cols, row_stride, group_stride, channels, LAYOUT, ROWS, COLS)
        before_norm = tl.load(x_ptr + at, mask, other=0).to(DTYPE)
        grad_output = tl.load(grad_output_ptr + at, mask, other=0).to(DTYPE)
        x = before_norm
        if LAYOUT != "flat":
            x = before_norm * scale + offset
        x, grad_input = _straight_through(x, grad_output, step, low, high, UNIFORM, RELU, STE, FROM_ZERO)
        if LAYOUT != "flat":
            grad_scale_sum += grad_input * (before_norm - mean)
            grad_bias_sum += grad_input
            grad_input *= scale
        if not SECOND_PASS:
            tl.store(grad_input_ptr + at, grad_input.to(grad_input_ptr.dtype.element_ty), mask)

        if REDUCTION != "none":
            if UNIFORM:
                y = round_half_even(clamp(x, low, high) - SHIFT) + SHIFT
            else:
                y, index = look_up(x, levels, thresholds, COUNT, TIES, DEPTH)
            inside = (x <= high) if FROM_ZERO else (x >= low) & (x <= high)
            if REDUCTION == "per_cell":
                width = divide(high - low, SEGMENTS + zeros)
                segment = tl.where(inside, clamp(divide(x - low, width), 0, SEGMENTS - 1), 0.0).to(tl.int32)
                slot = index + segment + 1
                value = tl.where(inside, grad_output, 0.0)
                moment = tl.where(inside, grad_output * (x - (low + segment.to(DTYPE) * width)), 0.0)
            else:
                value = tl.where(inside, (y - x) * grad_output, 0.0)
            new = (sums[0] if FROM_ZERO else tl.where(x < low, sums[0] + grad_output, sums[0]),)
            for k in tl.static_range(1, SLOTS - 1):
                if REDUCTION == "total":
                    new = new + (sums[k] + value,)
                elif REDUCTION == "per_gap":
                    new = new + (tl.where(x > levels[k - 1], sums[k] + value, sums[k]),)
                else:
                    new = new + (tl.where(slot == k, sums[k] + value, sums[k]),)
            sums = new + (tl.where(x > high, sums[SLOTS - 1] + grad_output, sums[SLOTS - 1]),)
            if REDUCTION == "per_cell":
                new = (moments[0],)
                for k in tl.static_range(1, SLOTS):
                    new = new + (tl.where(slot == k, moments[k] + moment, moments[k]),)
                moments = new

    if REDUCTION != "none":
        numbers: tl.constexpr = 2 * SLOTS if REDUCTION == "per_cell" else SLOTS
        partial += (group.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * numbers
        for k in tl.static_range(SLOTS):
            tl.store(partial + k, tl.sum(sums[k]))
            if REDUCTION == "per_cell":
                tl.store(partial + SLOTS + k, tl.sum(moments[k]))
    if LAYOUT != "flat":
        norm_partial += tl.program_id(1).to(tl.int64) * 2 * channels
        if LAYOUT == "channels_last":
            channel = group * COLS + tl.arange(0, COLS)
            tl.store(norm_partial + channel, tl.sum(grad_scale_sum, 0), channel < channels)
            tl.store(norm_partial + channels + channel, tl.sum(grad_bias_sum, 0), channel < channels)
        else:
            tl.store(norm_partial + group, tl.sum(grad_scale_sum))
            tl.store(norm_partial + channels + group, tl.sum(grad_bias_sum))


@triton.jit
def norm_backward(x_ptr, grad_output_ptr, grad_input_ptr, gaps_ptr, levels_ptr, mean_ptr, scale_ptr, bias_ptr, rstd_ptr,
                  grad_scale_sum_ptr, grad_bias_sum_ptr, tiles, rows, cols, row_stride, group_stride, channels, count,
                  UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr,
                  COUNT: tl.constexpr, RELU: tl.constexpr, STE: tl.constexpr, FROM_ZERO: tl.constexpr,
                  DTYPE: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The second pass after a batch norm in training: the gradient of x, once all sums are known.

    It has the part that goes through the statistics of the batch. mean is the mean of `count` elements, scale is weight
    rstd, rstd is 1 / sqrt(var + eps):  d rstd / d x = -rstd^3 (x - mean) / count,  d mean / d x = 1 / count.
    """
    mean, scale, offset = read_norm(mean_ptr, scale_ptr, bias_ptr, channels, LAYOUT, COLS)
    share = scale / tl.full((1, 1), count, DTYPE)
    rstd = of_channels(rstd_ptr, channels, LAYOUT, COLS)
    through_var = -of_channels(grad_scale_sum_ptr, channels, LAYOUT, COLS) * share * rstd * rstd
    through_mean = -of_channels(grad_bias_sum_ptr, channels, LAYOUT, COLS) * share
    zeros = tl.zeros((ROWS, COLS), DTYPE)
    step = tl.load(gaps_ptr) + zeros
    if UNIFORM:
        low = LOW + SHIFT + zeros
        high = HIGH + SHIFT + zeros
    else:
        low = tl.load(levels_ptr) + zeros
        high = tl.load(levels_ptr + COUNT) + zeros

    for number in range(tl.program_id(1), tiles, tl.num_programs(1)):
        at, mask = place(number, rows, cols, row_stride, group_stride, channels, LAYOUT, ROWS, COLS)
        before_norm = tl.load(x_ptr + at, mask, other=0).to(DTYPE)
        grad_output = tl.load(grad_output_ptr + at, mask, other=0).to(DTYPE)
        x, grad_input = _straight_through(before_norm * scale + offset, grad_output, step, low, high, UNIFORM, RELU,
                                          STE, FROM_ZERO)
        grad_input *= scale
        grad_input += (before_norm - mean) * through_var + through_mean
        tl.store(grad_input_ptr + at, grad_input.to(grad_input_ptr.dtype.element_ty), mask)


@triton.jit
def _finish_table(row, partial, gaps_ptr, levels_ptr, grad_gaps, grad_offset, grad_slope, programs,
                  UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr,
                  COUNT: tl.constexpr, NEGATIVE: tl.constexpr, REDUCTION: tl.constexpr, SLOTS: tl.constexpr,
                  WIDE: tl.constexpr, AT_ONCE: tl.constexpr):
    numbers: tl.constexpr = 2 * SLOTS if REDUCTION == "per_cell" else SLOTS
    slot = tl.arange(0, WIDE)
    sums = tl.zeros((AT_ONCE, WIDE), tl.float64)
    next_sums = tl.zeros((AT_ONCE, WIDE), tl.float64)  # per_gap: over the elements above the next level
    for start in range(0, programs, AT_ONCE):
        program = start + tl.arange(0, AT_ONCE)[:, None]
        at = partial + (row.to(tl.int64) * programs + program) * numbers + slot[None, :]
        sums += tl.load(at, (program < programs) & (slot[None, :] < numbers), other=0).to(tl.float64)
        if REDUCTION == "per_gap":
            next_sums += tl.load(at + 1, (program < programs) & (slot[None, :] < SLOTS - 2), other=0).to(tl.float64)
    total = tl.sum(sums, 0)
    below = tl.sum(tl.where(slot == 0, total, 0.0))
    above = tl.sum(tl.where(slot == SLOTS - 1, total, 0.0))
    within = (slot > 0) & (slot < SLOTS - 1)
    at = row * (SLOTS - 2) + slot - 1
    if REDUCTION == "per_gap":
        gradient = (total - tl.sum(next_sums, 0)) / tl.load(gaps_ptr + at, within, other=1).to(tl.float64)
        gradient += tl.where(slot <= NEGATIVE, -below, above)  # an end level is the sum of the gaps from zero to it
        tl.store(grad_gaps + at, gradient.to(grad_gaps.dtype.element_ty), within)
    else:
        unit = tl.load(gaps_ptr + row).to(tl.float64)
        if UNIFORM:
            gradient = (LOW + SHIFT) * below + (HIGH + SHIFT) * above
        else:
            levels_ptr += row * (COUNT + 1)
            lowest = tl.load(levels_ptr).to(tl.float64)
            gradient = (lowest * below + tl.load(levels_ptr + COUNT).to(tl.float64) * above) / unit
        if REDUCTION == "total":
            inside = tl.sum(tl.where(slot == 1, total, 0.0))
            gradient += inside if UNIFORM else inside / unit  # a uniform grid adds up in units of the step
        else:
            tl.store(grad_offset + at, total.to(grad_offset.dtype.element_ty), within)
            second_half = (slot > SLOTS) & (slot < 2 * SLOTS - 1)
            tl.store(grad_slope + at - SLOTS, total.to(grad_slope.dtype.element_ty), second_half)
        tl.store(grad_gaps + row, gradient.to(grad_gaps.dtype.element_ty))


@triton.jit
def _finish_norm(number, norm_partial, grad_scale_sum_ptr, grad_bias_sum_ptr, programs, channels,
                 AT_ONCE: tl.constexpr, COLS: tl.constexpr):
    channel = number * COLS + tl.arange(0, COLS)
    grad_scale_sum = tl.zeros((AT_ONCE, COLS), tl.float64)
    grad_bias_sum = tl.zeros((AT_ONCE, COLS), tl.float64)
    for start in range(0, programs, AT_ONCE):
        program = start + tl.arange(0, AT_ONCE)[:, None]
        at = norm_partial + program * 2 * channels + channel[None, :]
        mask = (program < programs) & (channel[None, :] < channels)
        grad_scale_sum += tl.load(at, mask, other=0).to(tl.float64)
        grad_bias_sum += tl.load(at + channels, mask, other=0).to(tl.float64)
    dtype = grad_scale_sum_ptr.dtype.element_ty
    tl.store(grad_scale_sum_ptr + channel, tl.sum(grad_scale_sum, 0).to(dtype), channel < channels)
    tl.store(grad_bias_sum_ptr + channel, tl.sum(grad_bias_sum, 0).to(dtype), channel < channels)


@triton.jit
def finish(partial, norm_partial, gaps_ptr, levels_ptr, grad_gaps, grad_offset, grad_slope, grad_scale_sum,
           grad_bias_sum, table_rows, programs, norm_programs, channels,
           UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
           NEGATIVE: tl.constexpr, REDUCTION: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
           AT_ONCE: tl.constexpr, CHANNEL_COLS: tl.constexpr):
    """Gradients from the sums of all programs, in double, because the sums beyond the ends may be large and cancel.

    One program for each row of the table, then one for every CHANNEL_COLS channels of the batch norm.
    """
    task = tl.program_id(0)
    if REDUCTION != "none":  # noqa: SIM102 -- static: Triton does not compile the other branch
        if task < table_rows:
            _finish_table(task, partial, gaps_ptr, levels_ptr, grad_gaps, grad_offset, grad_slope, programs, UNIFORM,
                          LOW, HIGH, SHIFT, COUNT, NEGATIVE, REDUCTION, SLOTS, WIDE, AT_ONCE)
    if CHANNEL_COLS:  # noqa: SIM102
        if task >= table_rows:
            _finish_norm(task - table_rows, norm_partial, grad_scale_sum, grad_bias_sum, norm_programs, channels,
                         AT_ONCE, CHANNEL_COLS)
