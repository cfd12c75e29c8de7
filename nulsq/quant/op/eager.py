"""The per-tensor form for a CPU without a compiler: the reference's values with fewer passes over memory.

torch.where costs ten times a multiplication on the CPU, so nothing here selects. Forward counts the index of the level
once and keeps it as one byte per element. The rest follows from it by table look-up:

    gap       index + [x > y]                      0 below the range, K + 1 above it, k inside gap k
    error     y - clamp(x)                         zero outside, without a mask
    sums      one weighted bincount over the gaps  V_1 ... V_K, and the sums of dL/dy below and above the range
"""

from typing import Any

import torch
from torch import Tensor

from nulsq.quant.op.reference import (
    Rule,
    Table,
    end_codes,
    gap_gradient,
    gradients,
    prepare,
    segment,
    without_unused_sums,
)

PIECE = 1 << 15  # elements that are added up one by one in float32


class Eager(torch.autograd.Function):
    """As `Reference`, for per-tensor tables. Gradients may differ where dL/dy is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gaps: Tensor, levels: Tensor | None, thresholds: Tensor | None,
                offset: Tensor | None, slope: Tensor | None, rule: Rule) -> Tensor:
        shape, order, dtype = x.shape, _memory_order(x), x.dtype
        flat, table = prepare(_flat(x, order), Table(gaps, levels, thresholds), rule)
        if rule.index == "uniform":
            index = None
            at = flat / table.gaps
            y = (at.sub_(rule.shift) if rule.shift else at).round_().clamp_(*rule.level_range)
            y = (y.add_(rule.shift) if rule.shift else y).mul_(table.gaps)
        else:
            count, (levels, thresholds) = len(rule.ties_up), table.values()
            index = torch.zeros_like(flat, dtype=torch.uint8 if count + 1 < 256 else torch.int16)
            for k, up in enumerate(rule.ties_up):
                index += _as_bytes(flat >= thresholds[k] if up else flat > thresholds[k])
            index += _as_bytes(flat != flat).to(index.dtype) * (count + 1)  # NaN in, NaN out: one past the levels
            y = _look_up(levels, index)
        ctx.rule, ctx.shape, ctx.order = rule, shape, order
        ctx.save_for_backward(x, index, gaps, levels, thresholds, offset, slope)
        return _unflat(y.to(dtype), shape, order)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, index, *table = ctx.saved_tensors
        rule, x_dtype, table_dtype = ctx.rule, x.dtype, table[0].dtype
        if torch.is_grad_enabled():  # create_graph=True: bincount has no derivative
            rule = without_unused_sums(rule, ctx.needs_input_grad)
            grad_input, grad_gaps, *rest = gradients(x, grad_output, Table(*table), rule)
            return grad_input, grad_gaps, None, None, *rest, None
        x, table = prepare(_flat(x, ctx.order), Table(*table), rule)
        grad_output = _flat(grad_output, ctx.order).to(x.dtype)

        low: Any  # a number or a tensor
        high: Any
        if rule.index == "uniform":
            at, (low, high) = x / table.gaps, end_codes(rule)
            clamped = at.clamp(low, high)
        else:
            levels, _ = table.values()
            at, low, high = x, levels[0], levels[-1]
            clamped = torch.maximum(torch.minimum(at, high), low)
        inside = clamped == at
        grad_input = grad_output * inside if rule.ste == "clip" else grad_output
        grad_input = grad_input.masked_fill(x <= 0, 0) if rule.relu else grad_input
        grad_input = _unflat(grad_input.to(x_dtype), ctx.shape, ctx.order)
        if rule.reduction == "none" or not any(ctx.needs_input_grad[1:]):
            return grad_input, *(None,) * 6

        if rule.index == "uniform":
            nearest = clamped.sub(rule.shift).round_().add_(rule.shift) if rule.shift else clamped.round()
            errors = nearest.sub_(clamped).mul_(grad_output).sum().view(1)
            below, above = (beyond.mul(grad_output).sum().view(1) for beyond in (at < low, at > high))
        elif rule.reduction == "per_cell":
            # Cells 1 ... K + S are inside the range, 0 is below and the last above it.
            count = len(rule.ties_up) + rule.segments
            number, start = segment(x, low, high, rule)
            cell = number.add_(index).add_(1).mul_(x >= low).masked_fill_(x > high, count + 1)
            sums = _sums(cell, grad_output, count + 2)
            moments = _sums(cell, grad_output * (clamped - start), count + 2)
            grad_gaps = gap_gradient(0.0, sums[:1], sums[-1:], table, rule).to(table_dtype)
            grad_offset, grad_slope = sums[1:-1].to(table_dtype), moments[1:-1].to(table_dtype)
            return grad_input, grad_gaps, None, None, grad_offset, grad_slope, None
        else:
            y = _look_up(levels, index)
            gap = index + _as_bytes(x > y)
            weights = y.sub_(clamped).add_(~inside).mul_(grad_output)
            count = rule.level_range[1] - rule.level_range[0]
            sums = _sums(gap, weights, count + 2)
            below, above = sums[:1], sums[-1:]
            errors = (sums[1:-1] if rule.reduction == "per_gap" else sums[1:-1].sum().view(1)) / table.gaps
        return grad_input, gap_gradient(errors, below, above, table, rule).to(table_dtype), *(None,) * 5


def _sums(bins: Tensor, weights: Tensor, count: int) -> Tensor:
    """Sum of the weights in each bin, by pieces: bincount adds term by term, and a million terms would lose digits."""
    pieces = zip(bins.split(PIECE), weights.split(PIECE), strict=True)
    return torch.stack([torch.bincount(*piece, count) for piece in pieces]).double().sum(0)


def _as_bytes(mask: Tensor) -> Tensor:
    """A mask as numbers, without the copy that adding booleans to bytes makes."""
    return mask.view(torch.uint8)


def _look_up(levels: Tensor, index: Tensor) -> Tensor:
    """levels[index]; NaN for an index past them."""
    return torch.cat([levels, levels.new_full((1,), torch.nan)]).index_select(0, index.int())


def _memory_order(x: Tensor) -> tuple[int, ...]:
    """The permutation of x's dimensions that follows its memory."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return (0, 2, 3, 1)
    return tuple(range(x.dim()))


def _flat(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x in one dimension, in this order: a view if x is dense in it."""
    return x.permute(order).reshape(-1)


def _unflat(flat: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    permuted = flat.view([shape[i] for i in order])
    return permuted.permute([order.index(i) for i in range(len(order))])
