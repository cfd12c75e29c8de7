"""The GPU kernel: launches the Triton kernels of triton_kernels.py.

    forward                     one pass
    backward                    one pass for the gradient of x, and a small kernel that finishes the sums
    backward after a batch      two passes: the first computes the sums, the second the gradient of x, with the part
    norm in training            that goes through the statistics of the batch

Nothing here reads a number back from the device, and sums have a fixed order. So a step can be captured as a CUDA
graph, and gives the same bits every time. Tables with more than 63 thresholds, and rules with more than 100 sums, use
the reference form: unrolled they would not fit into registers.
"""

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nulsq.quant.op import reference
from nulsq.quant.op.layout import gradient_buffers, match_layout, prepare_layout
from nulsq.quant.op.reference import Affine, Rule, Table, compute_dtype

MOST_THRESHOLDS, MOST_SLOTS = 63, 100
FORWARD_BLOCK, WARPS = 1024, 4
NARROW = (torch.bfloat16, torch.float16)
WAVES = 8  # programs for each multiprocessor
COLUMNS = 128, 64, 32  # widths of a tile over several channels
CHANNELS_AT_ONCE, NUMBERS_AT_ONCE, FINISH_WARPS = 32, 4096, 8  # of the kernel that finishes the sums


@functools.cache  # every quantizer calls it in every step
def available() -> bool:
    """Whether Triton is installed and there is a GPU."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def takes(rule: Rule) -> bool:
    """Whether the kernels have enough registers for this rule. If not, the reference form is used, without an affine
    map."""
    return slots_and_rows(rule)[1] <= MOST_SLOTS and len(rule.ties_up) <= MOST_THRESHOLDS


def quantize(x: Tensor, table: Table, rule: Rule, affine: Affine | None = None) -> Tensor:
    """y: the level of each element, after `affine` if there is one; shape, type and memory order of x."""
    if not takes(rule):
        assert affine is None
        return reference.quantize(x, table, rule)[0].to(x.dtype)
    dtype = x.dtype
    x, table, rows = prepare_layout(x, table, NARROW)
    y = torch.empty_like(x)
    if x.numel():
        affine = _prepare_affine(x, affine)
        walk = tiles(x, rows, affine, FORWARD_BLOCK)
        _kernels().quantize[walk.grid(x.device)](
            x, y, *_pointers(table), *_affine_arguments(affine, x)[:3], *walk.numbers, **_static(rule),
            DTYPE=_triton_dtype(x, table), **walk.constants, num_warps=WARPS, enable_fp_fusion=False)
    return y.to(dtype)


def gradients(x: Tensor, grad_output: Tensor, table: Table, rule: Rule,
              affine: Affine | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of x, gaps, offset and slope (None where the rule's reduction has none), and with an affine map also of
    its scale and bias."""
    if not takes(rule):
        assert affine is None
        return reference.gradients(x, grad_output, table, rule)
    x_dtype, sum_dtypes = x.dtype, [table.gaps.dtype] * 3
    if affine is not None:
        sum_dtypes += [affine.scale.dtype, affine.bias.dtype]
    sums = gradient_buffers(table, rule)
    x, table, rows = prepare_layout(x, table, NARROW)
    affine = _prepare_affine(x, affine)
    if affine is not None:
        sums += [torch.empty_like(affine.scale), torch.empty_like(affine.bias)]
    grad = match_layout(grad_output, x)
    grad_input = torch.empty_like(x) if grad is grad_output else grad  # only our own copy is written over
    if x.numel():
        _launch_backward(x, grad, grad_input, table, rule, affine, sums, rows)
    else:
        sums = [t if t is None else t.zero_() for t in sums]
    return grad_input.to(x_dtype), *(t if t is None else t.to(dtype) for t, dtype in zip(sums, sum_dtypes, strict=True))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel of x [N, C, ...]; float64 if x is, else float32."""
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)  # of bfloat16 in float32, in one pass
    return mean.to(compute_dtype(x)), var.to(compute_dtype(x))


def slots_and_rows(rule: Rule) -> tuple[int, int]:
    """Number of slots of the sums, and numbers that a program stores: for per_cell there are two for each slot."""
    slots = {"none": 0, "total": 3}.get(rule.reduction, len(rule.ties_up) + rule.segments + 2)
    return slots, 2 * slots if rule.reduction == "per_cell" else slots


class Tiles(NamedTuple):
    """How programs walk over a tensor, see triton_kernels.py."""

    groups: int  # dimension 0 of the grid, the only one that may be long: rows of the table, or groups of channels
    numbers: tuple[int, ...]  # tiles of a group, rows, columns, strides of rows and groups, channels of x
    constants: dict[str, Any]  # LAYOUT: "flat" without a batch norm, else "channels_last" or "planes"; ROWS and COLS

    def grid(self, device: torch.device) -> tuple[int, int]:
        return self.groups, max(1, min(self.numbers[0], WAVES * _multiprocessors(device) // self.groups))


def tiles(x: Tensor, table_rows: int, affine: Affine | None, block: int) -> Tiles:
    """Tiles of `block` elements for dense x, with a table of `table_rows` rows or after an affine map."""
    if affine is None:
        layout, groups, rows, columns, across = "flat", table_rows, 1, x.numel() // table_rows, block
        row_stride, group_stride, channels = 0, columns, 1
    elif x.stride(1) == 1:
        channels = row_stride = columns = x.shape[1]
        layout, across, rows = "channels_last", min(_tile_columns(channels), block), x.numel() // channels
        groups, group_stride = -(-channels // across), across
    else:
        channels = groups = x.shape[1]
        layout, rows, columns = "planes", x.shape[0], x.stride(1)
        across, row_stride, group_stride = min(_power_of_two(columns), block), channels * columns, columns
    down = block // across
    count = -(-rows // down) * (1 if layout == "channels_last" else -(-columns // across))
    return Tiles(groups, (count, rows, columns, row_stride, group_stride, channels),
                 {"LAYOUT": layout, "ROWS": down, "COLS": across})


def _launch_backward(x: Tensor, grad_output: Tensor, grad_input: Tensor, table: Table, rule: Rule,
                     affine: Affine | None, sums: list[Tensor | None], table_rows: int) -> None:
    """Launch the kernels that fill grad_input and the sums."""
    (slots, numbers), kernels, dtype = slots_and_rows(rule), _kernels(), _triton_dtype(x, table)
    walk = tiles(x, table_rows, affine, _backward_block(numbers, x.element_size(), affine is not None))
    (groups, programs), norm = walk.grid(x.device), _affine_arguments(affine, x)
    second_pass = affine is not None and affine.rstd is not None
    partial = x.new_empty(groups * programs * numbers, dtype=table.gaps.dtype)
    norm_partial = partial if affine is None else partial.new_empty(programs * 2 * walk.numbers[-1])
    static = _static(rule) | {"STE": rule.ste, "FROM_ZERO": _from_zero(rule)}
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    kernels.gradients[groups, programs](
        x, grad_output, grad_input, partial, norm_partial, *_pointers(table), *norm[:3], *walk.numbers, **static,
        **walk.constants, REDUCTION=rule.reduction, SEGMENTS=rule.segments, SLOTS=slots, DTYPE=dtype,
        SECOND_PASS=second_pass, **options)

    channels = 0 if affine is None else walk.numbers[-1]
    tables = table_rows if numbers else 0
    wide = max(2, _power_of_two(numbers))
    if tables or channels:
        ends = {name: static[name] for name in ("UNIFORM", "LOW", "HIGH", "SHIFT", "COUNT")}
        kernels.finish[(tables + -(-channels // CHANNELS_AT_ONCE),)](
            partial, norm_partial, *_pointers(table)[:2], *(partial if t is None else t for t in sums),
            *(partial for _ in range(5 - len(sums))), tables, programs if affine is None else groups * programs,
            programs, channels, **ends, NEGATIVE=-rule.level_range[0], REDUCTION=rule.reduction, SLOTS=slots, WIDE=wide,
            AT_ONCE=NUMBERS_AT_ONCE // max(wide, CHANNELS_AT_ONCE), CHANNEL_COLS=CHANNELS_AT_ONCE if channels else 0,
            num_warps=FINISH_WARPS, enable_fp_fusion=False)
    if second_pass:
        walk = tiles(x, table_rows, affine, FORWARD_BLOCK)
        static = {name: value for name, value in static.items() if name not in ("TIES", "DEPTH")}
        kernels.norm_backward[walk.grid(x.device)](
            x, grad_output, grad_input, *_pointers(table)[:2], *norm, *sums[3:], *walk.numbers, x.numel() // channels,
            **static, **walk.constants, DTYPE=dtype, **options)


def _backward_block(numbers: int, element_size: int, norm: bool) -> int:
    """Elements of a tile: 16 bytes for each thread if the accumulators leave enough registers, else 4 elements or 1."""
    numbers += 5 * norm  # two sums and three numbers of each channel
    elements = 16 // element_size if numbers <= 9 else 4 if numbers <= 24 else 1
    return 32 * WARPS * elements


def _prepare_affine(x: Tensor, affine: Affine | None) -> Affine | None:
    """The affine map in the computation type of x."""
    dtype = compute_dtype(x)
    return affine if affine is None else affine.map(lambda t: t.to(dtype).contiguous())


def _affine_arguments(affine: Affine | None, x: Tensor) -> tuple[Tensor, ...]:
    """The four tensors as arguments of a kernel. A kernel does not read those that are absent; x takes their place."""
    return (x,) * 4 if affine is None else tuple(x if t is None else t for t in affine)


def _triton_dtype(x: Tensor, table: Table) -> Any:
    """Triton's name of the computation type."""
    return _kernels().tl.float64 if compute_dtype(x, table) == torch.float64 else _kernels().tl.float32


def _pointers(table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """gaps, levels and thresholds. A uniform grid has only the first, and its kernel does not read the others."""
    if table.levels is None:
        return table.gaps, table.gaps, table.gaps
    return table.gaps, *table.values()


@functools.cache
def _static(rule: Rule) -> dict[str, Any]:
    return {"UNIFORM": rule.index == "uniform", "LOW": float(rule.level_range[0]), "HIGH": float(rule.level_range[1]),
            "SHIFT": float(rule.shift), "COUNT": len(rule.ties_up), "RELU": rule.relu,
            "TIES": sum(1 << k for k, up in enumerate(rule.ties_up) if up), "DEPTH": halves(rule.ties_up)}


def halves(ties_up: tuple[bool, ...]) -> int:
    """Depth of the kernel's binary search over these thresholds; 0 if it cannot be used.

    It needs 2^depth - 1 thresholds, and one rule for ties in each half without the middle threshold: the same in both,
    or "up" in the lower half, as in a grid with a zero in its middle, whose ties go to the level nearer zero.
    """
    depth = (len(ties_up) + 1).bit_length() - 1
    lower, upper = (set(half) for half in (ties_up[:len(ties_up) // 2], ties_up[len(ties_up) // 2 + 1:]))
    alike = len(lower) == len(upper) == 1 and (lower == upper or lower == {True})
    return depth if alike and len(ties_up) + 1 == 1 << depth else 0


def _from_zero(rule: Rule) -> bool:
    """Whether no element can be below the range: after a ReLU, on a grid whose lowest level is zero."""
    return (rule.relu and rule.level_range[0] + rule.shift == 0
            and (rule.index == "uniform" or rule.reduction == "per_gap"))


def _tile_columns(channels: int) -> int:
    """Channels in a tile: 128, 64 or 32, whichever leaves least of the last tile empty."""
    return min(_power_of_two(channels), min(COLUMNS, key=lambda columns: -(-channels // columns) * columns))


def _power_of_two(number: int) -> int:
    """The smallest one that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _kernels() -> Any:
    """The module of the kernels. Imported at the first launch, because Triton is large and not always installed."""
    return importlib.import_module("nulsq.quant.op.gpu.triton_kernels")
