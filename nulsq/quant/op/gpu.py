"""The GPU form: the Triton kernels of gpu_kernels.py, one pass over memory in each direction.

Nothing here reads a number back from the device, and sums have one order: a step can be captured as a CUDA graph, and
gives the same bits every time. Tables of more than 63 thresholds, or sums of more than 100 slots, are left to the
oracle's plain PyTorch: unrolled they would not fit into registers.
"""

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from nulsq.quant.op import oracle
from nulsq.quant.op.layout import gradient_buffers, laid_like, laid_out
from nulsq.quant.op.oracle import Rule, Table

MOST_THRESHOLDS, MOST_SLOTS = 63, 100
FORWARD_BLOCK, WARPS = 1024, 4
NARROW = (torch.bfloat16, torch.float16)
WAVES = 8  # programs for each multiprocessor


def available() -> bool:
    """Whether Triton is installed and there is a GPU."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def quantize(x: Tensor, table: Table, rule: Rule) -> Tensor:
    """y: the level of each element; shape, type and memory order of x."""
    if len(rule.ties_up) > MOST_THRESHOLDS:
        return oracle.quantize(x, table, rule)[0].to(x.dtype)
    stored = x.dtype
    x, table, channels = laid_out(x, table, NARROW)
    y = torch.empty_like(x)
    if x.numel():
        elements = x.numel() // channels
        grid = (_programs(elements, FORWARD_BLOCK, channels, x.device), channels)
        _kernels().quantize[grid](x, y, *_pointers(table), elements, **_static(rule), KIND=_kind(table),
                                  BLOCK=FORWARD_BLOCK, num_warps=WARPS, enable_fp_fusion=False)
    return y.to(stored)


def gradients(x: Tensor, dy: Tensor, table: Table, rule: Rule) -> tuple[Tensor, ...]:
    """dx and the gradients of gaps, offset and slope; empty where the rule's reduction has none."""
    slots, rows = slots_and_rows(rule)
    if rows > MOST_SLOTS or len(rule.ties_up) > MOST_THRESHOLDS:
        found = oracle.gradients(x, dy, table, rule)
        return tuple(table.gaps.new_empty(0) if each is None else each for each in found)
    buffers, stored = gradient_buffers(table, rule), x.dtype
    x, table, channels = laid_out(x, table, NARROW)
    dy, dx = laid_like(dy, x), torch.empty_like(x)
    if not x.numel():
        return dx.to(stored), *(each.zero_() for each in buffers)
    elements, block = x.numel() // channels, _block(rows, x.element_size())
    programs = _programs(elements, block, channels, x.device)
    partial = torch.empty(channels, programs, rows, dtype=table.gaps.dtype, device=x.device)
    _kernels().gradients[(programs, channels)](
        x, dy, dx, partial, *_pointers(table), elements, **_static(rule), STE=rule.ste, REDUCTION=rule.reduction,
        SEGMENTS=rule.segments, SLOTS=slots, KIND=_kind(table), BLOCK=block, num_warps=WARPS, enable_fp_fusion=False)
    if not rows:
        return dx.to(stored), *buffers
    sums = partial.double().sum(1)
    rows_of = Table(*(each if each is None else each.view(channels, -1) for each in table))
    below, middle, above = sums[:, :1], sums[:, 1:slots - 1], sums[:, slots - 1:slots]
    if rule.reduction == "per_cell":
        found = [oracle.gap_gradient(0.0, below, above, rows_of, rule), middle, sums[:, slots + 1:2 * slots - 1]]
    else:  # a uniform grid's errors are in steps already
        errors = middle if rule.index == "uniform" else middle / rows_of.gaps
        found = [oracle.gap_gradient(errors, below, above, rows_of, rule), *buffers[1:]]
    pairs = zip(found, buffers, strict=True)
    return dx.to(stored), *(each.view(buffer.shape).to(buffer.dtype) for each, buffer in pairs)


def slots_and_rows(rule: Rule) -> tuple[int, int]:
    """Slots of the sums as the kernel numbers them, and numbers that a program stores: also moments for per_cell."""
    slots = {"none": 0, "total": 3}.get(rule.reduction, len(rule.ties_up) + rule.segments + 2)
    return slots, 2 * slots if rule.reduction == "per_cell" else slots


def _block(rows, element_size):
    """16 bytes a thread where the accumulators leave room for that; four elements, or one, where there are many."""
    each = 16 // element_size if rows <= 9 else 4 if rows <= 20 else 1
    return 32 * WARPS * each


def _kind(table):
    """The type to compute in, as Triton has it."""
    return _kernels().tl.float64 if table.gaps.dtype == torch.float64 else _kernels().tl.float32


def _pointers(table):
    """gaps, levels, thresholds: a uniform grid has the first alone, and its kernel does not read the others."""
    if table.levels is None:
        return table.gaps, table.gaps, table.gaps
    return table.gaps, table.levels, table.thresholds


@functools.cache
def _static(rule):
    return {"UNIFORM": rule.index == "uniform", "LOW": float(rule.codes[0]), "HIGH": float(rule.codes[1]),
            "SHIFT": float(rule.shift), "COUNT": len(rule.ties_up), "RELU": rule.relu,
            "TIES": sum(1 << k for k, up in enumerate(rule.ties_up) if up)}


def _programs(elements, block, channels, device):
    blocks = -(-elements // block)
    return max(1, min(blocks, WAVES * _multiprocessors(device) // channels))


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _kernels():
    """Imported when the first one runs: Triton is no small import, and not everywhere."""
    return importlib.import_module("nulsq.quant.op.gpu_kernels")
