"""The kernels of the GPU form, in Triton. oracle.py defines what is computed, gpu.py calls them.

A program takes every `programs`-th block of a channel, so its sums stay in registers, an accumulator for each slot and
lane, until its last block: then each slot is added up once and stored for itself. No atomics, so the same bits every
time. Slots of the sums: 0 below the range, the last of gaps (or cells) + 2 above it, what lies in gap k at k.

Everything static is a constexpr: which thresholds take ties upward is a bit mask, loops over levels are unrolled.
Division is div_rn where it decides a level: Triton's own / on float32 is an approximation.
"""

import triton
import triton.language as tl


@triton.jit
def _divide(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _round_half_even(x):
    """For |x| < 2^21: adding 1.5 * 2^23 (2^52) leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0 if x.dtype == tl.float32 else (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def _clamp(x, low, high):
    x = tl.where(x < low, low, x)  # a NaN stays one
    return tl.where(x > high, high, x)


@triton.jit
def _above(x, threshold, TIES: tl.constexpr, k: tl.constexpr):
    return x >= threshold if (TIES >> k) & 1 else x > threshold


@triton.jit
def _look_up(x, levels, thresholds, COUNT: tl.constexpr, TIES: tl.constexpr):
    """Level and its index."""
    y = tl.where(x == x, tl.load(levels), x)
    index = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range(COUNT):
        above = _above(x, tl.load(thresholds + k), TIES, k)
        y = tl.where(above, tl.load(levels + k + 1), y)
        index += above.to(tl.int32)
    return y, index


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # a NaN stays one


@triton.jit
def quantize(x_from, y_to, gaps, levels, thresholds, elements,
             UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
             RELU: tl.constexpr, TIES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(1).to(tl.int64)
    gaps += channel
    levels += channel * (COUNT + 1)
    thresholds += channel * COUNT
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, elements, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < elements
        x = tl.load(x_from + channel * elements + at, mask, other=0).to(KIND)
        if RELU:
            x = _relu(x)
        if UNIFORM:
            step = tl.load(gaps)
            code = _round_half_even(_clamp(_divide(x, step + tl.zeros_like(x)) - SHIFT, LOW, HIGH))
            y = (code + SHIFT) * step
        else:
            y, _ = _look_up(x, levels, thresholds, COUNT, TIES)
        tl.store(y_to + channel * elements + at, y.to(y_to.dtype.element_ty), mask)


@triton.jit
def gradients(x_from, dy_from, dx_to, partial, gaps, levels, thresholds, elements,
              UNIFORM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr,
              RELU: tl.constexpr, TIES: tl.constexpr, STE: tl.constexpr, REDUCTION: tl.constexpr,
              SEGMENTS: tl.constexpr, SLOTS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """dx, and the sums of this program: partial [channels, programs, SLOTS], twice as many slots for per_cell."""
    channel = tl.program_id(1).to(tl.int64)
    gaps += channel
    levels += channel * (COUNT + 1)
    thresholds += channel * COUNT
    nothing = tl.zeros((BLOCK,), KIND)
    sums = ()
    moments = ()
    for _ in tl.static_range(SLOTS):
        sums = sums + (nothing,)
        if REDUCTION == "per_cell":
            moments = moments + (nothing,)

    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, elements, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < elements
        x = tl.load(x_from + channel * elements + at, mask, other=0).to(KIND)
        dy = tl.load(dy_from + channel * elements + at, mask, other=0).to(KIND)
        if RELU:
            x = _relu(x)
            passes = x != 0
        if UNIFORM:
            x = _divide(x, tl.load(gaps) + nothing)
            low = LOW + SHIFT + nothing
            high = HIGH + SHIFT + nothing
        else:
            low = tl.load(levels) + nothing
            high = tl.load(levels + COUNT) + nothing
        inside = (x >= low) & (x <= high)

        if STE == "none":
            dx = dy
        elif STE == "clip":
            dx = tl.where(inside, dy, 0.0)
        else:
            dx = tl.where((x > low) & (x < high), dy, 0.0)
            if STE == "half":
                dx += tl.where((x == low) | (x == high), 0.5 * dy, 0.0)
        if RELU:
            dx = tl.where(passes, dx, 0.0)
        tl.store(dx_to + channel * elements + at, dx.to(dx_to.dtype.element_ty), mask)

        if REDUCTION != "none":
            if UNIFORM:
                y = _round_half_even(_clamp(x, low, high) - SHIFT) + SHIFT
                index = tl.zeros((BLOCK,), tl.int32)
            else:
                y, index = _look_up(x, levels, thresholds, COUNT, TIES)
            if REDUCTION == "per_cell":
                width = _divide(high - low, SEGMENTS + nothing)
                number = tl.where(inside, _clamp(_divide(x - low, width), 0, SEGMENTS - 1), 0.0).to(tl.int32)
                slot = index + number + 1
                value = tl.where(inside, dy, 0.0)
                moment = tl.where(inside, dy * (x - (low + number.to(KIND) * width)), 0.0)
            else:
                slot = tl.zeros((BLOCK,), tl.int32) + 1 if REDUCTION == "total" else index + (x > y).to(tl.int32)
                value = tl.where(inside, (y - x) * dy, 0.0)
            below = sums[0] + tl.where(x < low, dy, 0.0)
            above = sums[SLOTS - 1] + tl.where(x > high, dy, 0.0)
            new = (below,)
            for k in tl.static_range(1, SLOTS - 1):
                new = new + (sums[k] + (value if REDUCTION == "total" else tl.where(slot == k, value, 0.0)),)
            sums = new + (above,)
            if REDUCTION == "per_cell":
                new = (moments[0],)
                for k in tl.static_range(1, SLOTS):
                    new = new + (moments[k] + tl.where(slot == k, moment, 0.0),)
                moments = new

    if REDUCTION != "none":
        rows: tl.constexpr = 2 * SLOTS if REDUCTION == "per_cell" else SLOTS
        partial += (channel * tl.num_programs(0) + tl.program_id(0)) * rows
        for k in tl.static_range(SLOTS):
            tl.store(partial + k, tl.sum(sums[k], 0))
            if REDUCTION == "per_cell":
                tl.store(partial + SLOTS + k, tl.sum(moments[k], 0))
