"""Parts of the Triton kernels: arithmetic, the look-up of a level, and the tiles that a program walks over.

All static values are constexpr: the thresholds whose ties go up are a bit mask, and loops over levels are unrolled.
Division is div_rn where it decides a level, since Triton's own / on float32 is an approximation.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def round_half_even(x):
    """For |x| < 2^21: adding 1.5 * 2^23 (2^52) rounds the fraction away."""
    return (x + 12582912.0) - 12582912.0 if x.dtype == tl.float32 else (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def clamp(x, low, high):
    x = tl.where(x < low, low, x)  # NaN stays NaN
    return tl.where(x > high, high, x)


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays NaN


@triton.jit
def read_table(ptr, COUNT: tl.constexpr):
    """COUNT numbers as a tuple, which stays in registers."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(ptr + k),)
    return values


@triton.jit
def _above(x, threshold, TIES: tl.constexpr, k: tl.constexpr):
    return x >= threshold if (TIES >> k) & 1 else x > threshold


@triton.jit
def _linear_search(x, levels, thresholds, COUNT: tl.constexpr, TIES: tl.constexpr):
    y = levels[0] + tl.zeros_like(x)
    index = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range(COUNT):
        above = _above(x, thresholds[k], TIES, k)
        y = tl.where(above, levels[k + 1], y)
        index += above.to(tl.int32)
    return y, index


@triton.jit
def _binary_search(x, levels, thresholds, COUNT: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr):
    """As `_linear_search`, for 2^DEPTH levels.

    It takes as many instructions, but DEPTH predicates instead of one for each threshold: a GPU has seven predicates,
    and moves more of them in and out of registers. At each depth all thresholds that an element may be compared with
    have the same rule for ties, in the lower and in the upper half each (`halves` in kernel.py).
    """
    index = tl.zeros(x.shape, tl.int32)
    upper = x != x
    for d in tl.static_range(DEPTH):
        # the remaining table has 2 h levels, and threshold h - 1 is between its halves
        middle = thresholds[(1 << (DEPTH - d - 1)) - 1]
        if d == 0:
            above = _above(x, middle, TIES, COUNT // 2)
            upper = above
        elif TIES & 1 and not (TIES >> (COUNT - 1)) & 1:
            above = (x > middle) | ((x == middle) & ~upper)
        else:
            above = _above(x, middle, TIES, 0)
        half_levels = ()
        for k in tl.static_range(1 << (DEPTH - d - 1)):
            half_levels = half_levels + (tl.where(above, levels[k + (1 << (DEPTH - d - 1))], levels[k]),)
        half_thresholds = ()
        for k in tl.static_range((1 << (DEPTH - d - 1)) - 1):
            half_thresholds = half_thresholds + (
                tl.where(above, thresholds[k + (1 << (DEPTH - d - 1))], thresholds[k]),)
        levels = half_levels
        thresholds = half_thresholds
        index = 2 * index + above.to(tl.int32)
    return levels[0], index


@triton.jit
def look_up(x, levels, thresholds, COUNT: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr):
    """Level and its index; a NaN has the lowest."""
    if DEPTH:
        return _binary_search(x, levels, thresholds, COUNT, TIES, DEPTH)
    return _linear_search(x, levels, thresholds, COUNT, TIES)


@triton.jit
def of_channels(ptr, channels, LAYOUT: tl.constexpr, COLS: tl.constexpr):
    """The values of a tile's channels, out of numbers [channels]."""
    group = tl.program_id(0)
    if LAYOUT == "channels_last":
        channel = group * COLS + tl.arange(0, COLS)[None, :]
        values = tl.load(ptr + channel, channel < channels, other=0)
    else:
        values = tl.load(ptr + group)
    return values


@triton.jit
def read_norm(mean_ptr, scale_ptr, bias_ptr, channels, LAYOUT: tl.constexpr, COLS: tl.constexpr):
    """The batch norm of a tile's channels as mean, scale and offset of x scale + offset."""
    mean = of_channels(mean_ptr, channels, LAYOUT, COLS)
    scale = of_channels(scale_ptr, channels, LAYOUT, COLS)
    return mean, scale, of_channels(bias_ptr, channels, LAYOUT, COLS) - mean * scale


@triton.jit
def place(number, rows, cols, row_stride, group_stride, channels,
          LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets of the elements of tile `number` of this group, and a mask of those inside the tensor."""
    start = tl.program_id(0).to(tl.int64) * group_stride
    down = tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, COLS)[None, :]
    if LAYOUT == "flat":  # one row
        across += tl.full((1, 1), number, tl.int64) * COLS
        mask = (across < cols) & (down < rows)
    elif LAYOUT == "channels_last":  # a row is all channels, a group COLS of them
        down += tl.full((1, 1), number, tl.int64) * ROWS
        mask = (down < rows) & (tl.program_id(0) * COLS + across < channels)
    else:  # a row is one channel of an image
        tiles_across = tl.cdiv(cols, COLS)
        down += number // tiles_across * ROWS
        across += number % tiles_across * COLS
        mask = (down < rows) & (across < cols)
    return start + down.to(tl.int64) * row_stride + across, mask
