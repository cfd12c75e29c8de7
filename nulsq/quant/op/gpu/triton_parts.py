"""What the kernels of the GPU form are made of: arithmetic, the look-up of a level, and the tiles that they walk in.

Everything static is a constexpr: which thresholds take ties upward is a bit mask, loops over levels are unrolled.
Division is div_rn where it decides a level: Triton's own / on float32 is an approximation.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def round_half_even(x):
    """For |x| < 2^21: adding 1.5 * 2^23 (2^52) leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0 if x.dtype == tl.float32 else (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def clamp(x, low, high):
    x = tl.where(x < low, low, x)  # a NaN stays one
    return tl.where(x > high, high, x)


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # a NaN stays one


@triton.jit
def read(of, COUNT: tl.constexpr):
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.load(of + k),)
    return found


@triton.jit
def _above(x, threshold, TIES: tl.constexpr, k: tl.constexpr):
    return x >= threshold if (TIES >> k) & 1 else x > threshold


@triton.jit
def _one_by_one(x, levels, thresholds, COUNT: tl.constexpr, TIES: tl.constexpr):
    y = levels[0] + tl.zeros_like(x)
    index = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range(COUNT):
        above = _above(x, thresholds[k], TIES, k)
        y = tl.where(above, levels[k + 1], y)
        index += above.to(tl.int32)
    return y, index


@triton.jit
def _by_halves(x, levels, thresholds, COUNT: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr):
    """As `_one_by_one` for 2^DEPTH levels. As many instructions, but DEPTH predicates in the place of one for each
    threshold: of those a GPU has seven, and moves the rest in and out of registers. The ties of all thresholds that an
    element can meet at one depth are alike up to the middle and from there on (`halves` in gpu.py).
    """
    index = tl.zeros(x.shape, tl.int32)
    upper = x != x
    for d in tl.static_range(DEPTH):
        # what is left of the two tables has 2 h levels, the threshold between its halves is number h - 1
        middle = thresholds[(1 << (DEPTH - d - 1)) - 1]
        if d == 0:
            above = _above(x, middle, TIES, COUNT // 2)
            upper = above
        elif TIES & 1 and not (TIES >> (COUNT - 1)) & 1:
            above = (x > middle) | ((x == middle) & ~upper)
        else:
            above = _above(x, middle, TIES, 0)
        lesser_levels = ()
        for k in tl.static_range(1 << (DEPTH - d - 1)):
            lesser_levels = lesser_levels + (tl.where(above, levels[k + (1 << (DEPTH - d - 1))], levels[k]),)
        lesser_thresholds = ()
        for k in tl.static_range((1 << (DEPTH - d - 1)) - 1):
            lesser_thresholds = lesser_thresholds + (
                tl.where(above, thresholds[k + (1 << (DEPTH - d - 1))], thresholds[k]),)
        levels = lesser_levels
        thresholds = lesser_thresholds
        index = 2 * index + above.to(tl.int32)
    return levels[0], index


@triton.jit
def look_up(x, levels, thresholds, COUNT: tl.constexpr, TIES: tl.constexpr, DEPTH: tl.constexpr):
    """Level and its index; of a NaN the lowest."""
    if DEPTH:
        return _by_halves(x, levels, thresholds, COUNT, TIES, DEPTH)
    return _one_by_one(x, levels, thresholds, COUNT, TIES)


@triton.jit
def line(of, features, LINES: tl.constexpr, COLS: tl.constexpr):
    """What a tile's elements have of numbers [features], one for each channel."""
    lane = tl.program_id(0)
    if LINES == "last":
        channel = lane * COLS + tl.arange(0, COLS)[None, :]
        found = tl.load(of + channel, channel < features, other=0)
    else:
        found = tl.load(of + lane)
    return found


@triton.jit
def lines(center, scale, shift, features, LINES: tl.constexpr, COLS: tl.constexpr):
    """A batch norm of a tile's elements: center, slope and rise of x slope + rise."""
    middle = line(center, features, LINES, COLS)
    slope = line(scale, features, LINES, COLS)
    return middle, slope, line(shift, features, LINES, COLS) - middle * slope


@triton.jit
def place(number, rows, cols, row_stride, lane_stride, features,
           LINES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets of tile `number` of this lane, and which of them are there."""
    start = tl.program_id(0).to(tl.int64) * lane_stride
    down = tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, COLS)[None, :]
    if LINES == "none":  # one row
        across += tl.full((1, 1), number, tl.int64) * COLS
        there = (across < cols) & (down < rows)
    elif LINES == "last":  # a row is all channels, a lane COLS of them
        down += tl.full((1, 1), number, tl.int64) * ROWS
        there = (down < rows) & (tl.program_id(0) * COLS + across < features)
    else:  # a row is one channel of an image
        tiles_across = tl.cdiv(cols, COLS)
        down += number // tiles_across * ROWS
        across += number % tiles_across * COLS
        there = (down < rows) & (across < cols)
    return start + down.to(tl.int64) * row_stride + across, there
