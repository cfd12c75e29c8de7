"""The GPU form: the Triton kernels of gpu_kernels.py.

    forward                  one pass
    backward                 one pass, which gives dx, and a small kernel that finishes the sums
    backward behind a batch  two passes: the first for the sums alone, the second gives dx, with what goes through the
    norm                     batch's statistics in it

Nothing here reads a number back from the device, and sums have one order: a step can be captured as a CUDA graph, and
gives the same bits every time. Tables of more than 63 thresholds, or sums of more than 100 slots, are left to the
oracle's plain PyTorch: unrolled they would not fit into registers.
"""

import functools
import importlib
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from nulsq.quant.op import reference as oracle
from nulsq.quant.op.layout import gradient_buffers, laid_like, laid_out
from nulsq.quant.op.reference import Affine, Rule, Table, computed_in

MOST_THRESHOLDS, MOST_SLOTS = 63, 100
FORWARD_BLOCK, WARPS = 1024, 4
NARROW = (torch.bfloat16, torch.float16)
WAVES = 8  # programs for each multiprocessor
COLUMNS = 128, 64, 32  # of a tile that lies across channels
LINES_AT_ONCE, NUMBERS_AT_ONCE, FINISH_WARPS = 32, 4096, 8  # of the kernel that finishes the sums


@functools.cache  # every quantizer asks in every step
def available() -> bool:
    """Whether Triton is installed and there is a GPU."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def takes(rule: Rule) -> bool:
    """Whether the kernels have room for this many thresholds and sums; else the oracle serves, without a batch norm."""
    return slots_and_rows(rule)[1] <= MOST_SLOTS and len(rule.ties_up) <= MOST_THRESHOLDS


def quantize(x: Tensor, table: Table, rule: Rule, affine: Affine | None = None) -> Tensor:
    """y: the level of each element, behind `affine` if there is one; shape, type and memory order of x."""
    if not takes(rule):
        assert affine is None
        return oracle.quantize(x, table, rule)[0].to(x.dtype)
    stored = x.dtype
    x, table, channels = laid_out(x, table, NARROW)
    y = torch.empty_like(x)
    if x.numel():
        affine = _lines(x, affine)
        walk = tiles(x, channels, affine, FORWARD_BLOCK)
        _kernels().quantize[walk.grid(x.device)](
            x, y, *_pointers(table), *_or(affine, x)[:3], *walk.numbers, **_static(rule), KIND=_kind(x, table),
            **walk.constants, num_warps=WARPS, enable_fp_fusion=False)
    return y.to(stored)


def gradients(x: Tensor, dy: Tensor, table: Table, rule: Rule,
              affine: Affine | None = None) -> tuple[Tensor | None, ...]:
    """dx and the gradients of gaps, offset and slope, None where the rule's reduction has none; and, where there is an
    affine map, of its scale and shift.
    """
    if not takes(rule):
        assert affine is None
        return oracle.gradients(x, dy, table, rule)
    stored, kinds = x.dtype, [table.gaps.dtype] * 3 + [each.dtype for each in (affine or ())[1:3]]
    buffers = gradient_buffers(table, rule)
    x, table, channels = laid_out(x, table, NARROW)
    affine = _lines(x, affine)
    buffers += [torch.empty_like(each) for each in (affine or ())[1:3]]
    given, dy = dy, laid_like(dy, x)
    dx = torch.empty_like(x) if dy is given else dy  # a copy of ours may be written over
    if x.numel():
        _run(x, dy, dx, table, rule, affine, buffers, channels)
    else:
        buffers = [each if each is None else each.zero_() for each in buffers]
    return dx.to(stored), *(each if each is None else each.to(kind) for each, kind in zip(buffers, kinds, strict=True))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel of x [N, C, ...]; float32, of a double in its type."""
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)  # of bfloat16 in float32, in one pass
    return mean.to(computed_in(x)), var.to(computed_in(x))


def slots_and_rows(rule: Rule) -> tuple[int, int]:
    """Slots of the sums as the kernel numbers them, and numbers that a program stores: also moments for per_cell."""
    slots = {"none": 0, "total": 3}.get(rule.reduction, len(rule.ties_up) + rule.segments + 2)
    return slots, 2 * slots if rule.reduction == "per_cell" else slots


class Tiles(NamedTuple):
    """How programs walk over a tensor, see gpu_kernels.py."""

    lanes: int  # dimension 0 of the grid, which may be long
    numbers: tuple[int, ...]  # tiles of a lane, rows, columns, strides of rows and lanes, channels of x
    constants: dict  # LINES: "none", or where x's channels are: "last", or each in a "plane"; ROWS and COLS of a tile

    def grid(self, device: torch.device) -> tuple[int, int]:
        return self.lanes, max(1, min(self.numbers[0], WAVES * _multiprocessors(device) // self.lanes))


def tiles(x: Tensor, channels: int, affine: Affine | None, block: int) -> Tiles:
    """Tiles of `block` elements for x, dense, with `channels` rows of a table, or behind an affine map."""
    if affine is None:
        kind, lanes, rows, columns, across = "none", channels, 1, x.numel() // channels, block
        row_stride, lane_stride, features = 0, columns, 1
    elif x.stride(1) == 1:
        features = row_stride = columns = x.shape[1]
        kind, across, rows = "last", min(_columns(features), block), x.numel() // features
        lanes, lane_stride = -(-features // across), across
    else:
        features = lanes = x.shape[1]
        kind, rows, columns = "plane", x.shape[0], x.stride(1)
        across, row_stride, lane_stride = min(_power(columns), block), features * columns, columns
    down = block // across
    count = -(-rows // down) * (1 if kind == "last" else -(-columns // across))
    return Tiles(lanes, (count, rows, columns, row_stride, lane_stride, features),
                 {"LINES": kind, "ROWS": down, "COLS": across})


def _run(x, dy, dx, table, rule, affine, buffers, channels):
    """The kernels of backward: fill dx and the buffers."""
    (slots, rows), kernels, kind = slots_and_rows(rule), _kernels(), _kind(x, table)
    walk = tiles(x, channels, affine, _block(rows, x.element_size(), affine is not None))
    (lanes, programs), lines = walk.grid(x.device), _or(affine, x)
    twice = affine is not None and affine.inverse is not None
    partial = x.new_empty(lanes * programs * rows, dtype=table.gaps.dtype)
    line_partial = partial if affine is None else partial.new_empty(programs * 2 * walk.numbers[-1])
    static = _static(rule) | {"STE": rule.ste, "FROM_ZERO": _from_zero(rule)}
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    kernels.gradients[lanes, programs](
        x, dy, dx, partial, line_partial, *_pointers(table), *lines[:3], *walk.numbers, **static, **walk.constants,
        REDUCTION=rule.reduction, SEGMENTS=rule.segments, SLOTS=slots, KIND=kind, TWICE=twice, **options)

    features = 0 if affine is None else walk.numbers[-1]
    tables = 0 if not rows else channels
    wide = max(2, _power(rows))
    if tables or features:
        ends = {name: static[name] for name in ("UNIFORM", "LOW", "HIGH", "SHIFT", "COUNT")}
        kernels.finish[(tables + -(-features // LINES_AT_ONCE),)](
            partial, line_partial, *_pointers(table)[:2], *(partial if each is None else each for each in buffers),
            *(partial for _ in range(5 - len(buffers))), tables, programs if affine is None else lanes * programs,
            programs, features, **ends, NEGATIVE=-rule.level_range[0], REDUCTION=rule.reduction, SLOTS=slots, WIDE=wide,
            AT_ONCE=NUMBERS_AT_ONCE // max(wide, LINES_AT_ONCE), LINE_COLS=LINES_AT_ONCE if features else 0,
            num_warps=FINISH_WARPS, enable_fp_fusion=False)
    if twice:
        walk = tiles(x, channels, affine, FORWARD_BLOCK)
        static = {name: value for name, value in static.items() if name not in ("TIES", "DEPTH")}
        kernels.passed_on[walk.grid(x.device)](
            x, dy, dx, *_pointers(table)[:2], *lines, *buffers[3:], *walk.numbers,
            x.numel() // features, **static, **walk.constants, KIND=kind, **options)


def _block(rows, element_size, lines=False):
    """16 bytes a thread where the accumulators leave room for that; four elements, or one, where there are many."""
    rows += 5 * lines  # two sums and three numbers of each channel
    each = 16 // element_size if rows <= 9 else 4 if rows <= 24 else 1
    return 32 * WARPS * each


def _lines(x, affine):
    """The lines in the type that x is computed in."""
    if affine is None:
        return None
    return Affine(*(each if each is None else each.to(computed_in(x)).contiguous() for each in affine))


def _or(affine, x):
    """The four lines as arguments of a kernel: anything stands for those that are not there, and is not read."""
    return (x,) * 4 if affine is None else tuple(x if each is None else each for each in affine)


def _kind(x, table):
    """The type to compute in, as Triton has it."""
    return _kernels().tl.float64 if computed_in(x, table) == torch.float64 else _kernels().tl.float32


def _pointers(table):
    """gaps, levels, thresholds: a uniform grid has the first alone, and its kernel does not read the others."""
    if table.levels is None:
        return table.gaps, table.gaps, table.gaps
    return table.gaps, table.levels, table.thresholds


@functools.cache
def _static(rule):
    return {"UNIFORM": rule.index == "uniform", "LOW": float(rule.level_range[0]), "HIGH": float(rule.level_range[1]),
            "SHIFT": float(rule.shift), "COUNT": len(rule.ties_up), "RELU": rule.relu,
            "TIES": sum(1 << k for k, up in enumerate(rule.ties_up) if up), "DEPTH": halves(rule.ties_up)}


def halves(ties_up: tuple[bool, ...]) -> int:
    """How often the thresholds can be halved until one is left, where the kernel's look-up can do that; else 0.

    Of those beside the middle one each half has one rule for ties, the lower "up" where they differ: as in a grid with
    a zero in its middle, whose ties go to the level nearer zero.
    """
    depth = (len(ties_up) + 1).bit_length() - 1
    lower, upper = (set(half) for half in (ties_up[:len(ties_up) // 2], ties_up[len(ties_up) // 2 + 1:]))
    alike = len(lower) == len(upper) == 1 and (lower == upper or lower == {True})
    return depth if alike and len(ties_up) + 1 == 1 << depth else 0


def _from_zero(rule):
    """Whether nothing can lie below the range: behind a ReLU, on a grid whose lowest level is zero."""
    return (rule.relu and rule.level_range[0] + rule.shift == 0
            and (rule.index == "uniform" or rule.reduction == "per_gap"))


def _columns(features):
    """How many channels a tile has beside each other: of 128, 64 and 32 what leaves least of the last tile empty."""
    return min(_power(features), min(COLUMNS, key=lambda columns: -(-features // columns) * columns))


def _power(number):
    return 1 << max(0, number - 1).bit_length()


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _kernels():
    """Imported when the first one runs: Triton is no small import, and not everywhere."""
    return importlib.import_module("nulsq.quant.op.gpu.triton_kernels")
