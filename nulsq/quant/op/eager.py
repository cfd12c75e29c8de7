"""The per-tensor form for the CPU without a compiler: the oracle's values with fewer passes over memory.

Selecting (torch.where) costs ten times a multiplication on the CPU, so nothing is selected here. The level's index
is counted once, kept as one byte per element, and everything follows from it by table lookup:

    gap       index + [x > y]                      0 below the range, K + 1 above it, k inside gap k
    error     y - clamp(x)                         zero outside, without a mask
    sums      one weighted bincount over the gaps  V_1 ... V_K, and dy summed below and above
"""

import torch

from nulsq.quant.op.reference import Table, end_codes, gap_gradient, prepared, segment

PIECE = 1 << 15  # elements that are summed up one by one in float32


class Eager(torch.autograd.Function):
    """As `Oracle`, for per-tensor tables. Gradients of non-finite dy may differ: there is nothing to train then."""

    @staticmethod
    def forward(ctx, x, gaps, levels, thresholds, offset, slope, rule):
        shape, stored = (x.shape, _order(x)), x.dtype
        kept = _flat(x, shape[1])
        x, table = prepared(kept, Table(gaps, levels, thresholds), rule)
        if rule.index == "uniform":
            index = None
            at = x / table.gaps
            y = (at.sub_(rule.shift) if rule.shift else at).round_().clamp_(*rule.level_range)
            y = (y.add_(rule.shift) if rule.shift else y).mul_(table.gaps)
        else:
            count = len(rule.ties_up)
            index = torch.zeros_like(x, dtype=torch.uint8 if count + 1 < 256 else torch.int16)
            for k, up in enumerate(rule.ties_up):
                index += _byte(x >= table.thresholds[k] if up else x > table.thresholds[k])
            index += _byte(x != x).to(index.dtype) * (count + 1)  # NaN in, NaN out: one past the levels
            y = _look_up(table.levels, index)
        ctx.rule, ctx.shape = rule, shape
        ctx.save_for_backward(kept, index, gaps, levels, thresholds)
        return _unflat(y.to(stored), *shape)

    @staticmethod
    def backward(ctx, dy):
        x, index, *saved = ctx.saved_tensors
        rule, stored, kind = ctx.rule, x.dtype, saved[0].dtype
        x, table = prepared(x, Table(*saved), rule)
        dy = _flat(dy, ctx.shape[1]).to(x.dtype)

        if rule.index == "uniform":
            at, (low, high) = x / table.gaps, end_codes(rule)
            clamped = at.clamp(low, high)
        else:
            at, low, high = x, table.levels[0], table.levels[-1]
            clamped = torch.maximum(torch.minimum(at, high), low)
        inside = clamped == at
        dx = dy * inside if rule.ste == "clip" else dy
        dx = dx.masked_fill(x <= 0, 0) if rule.relu else dx
        dx = _unflat(dx.to(stored), *ctx.shape)
        if rule.reduction == "none" or not any(ctx.needs_input_grad[1:]):
            return dx, *(None,) * 6

        if rule.index == "uniform":
            nearest = clamped.sub(rule.shift).round_().add_(rule.shift) if rule.shift else clamped.round()
            errors = nearest.sub_(clamped).mul_(dy).sum().view(1)
            below, above = (beyond.mul(dy).sum().view(1) for beyond in (at < low, at > high))
        elif rule.reduction == "per_cell":
            # Cells 1 ... K + S lie inside, 0 below and the last above.
            count = len(rule.ties_up) + rule.segments
            number, start = segment(clamped, low, high, rule)
            cell = number.add_(index).add_(1).mul_(x >= low).masked_fill_(x > high, count + 1)
            sums, moments = _sums(cell, dy, count + 2), _sums(cell, dy * (clamped - start), count + 2)
            dgaps = gap_gradient(0.0, sums[:1], sums[-1:], table, rule)
            return dx, dgaps.to(kind), None, None, sums[1:-1].to(kind), moments[1:-1].to(kind), None
        else:
            y = _look_up(table.levels, index)
            gap = index + _byte(x > y)
            weights = y.sub_(clamped).add_(~inside).mul_(dy)
            count = rule.level_range[1] - rule.level_range[0]
            sums = _sums(gap, weights, count + 2)
            below, above = sums[:1], sums[-1:]
            errors = (sums[1:-1] if rule.reduction == "per_gap" else sums[1:-1].sum().view(1)) / table.gaps
        return dx, gap_gradient(errors, below, above, table, rule).to(kind), *(None,) * 5


def _sums(bins, weights, count):
    """Sum of the weights in each bin. In pieces: bincount adds term by term, and a million terms would lose digits."""
    pieces = zip(bins.split(PIECE), weights.split(PIECE), strict=True)
    return torch.stack([torch.bincount(*piece, count) for piece in pieces]).double().sum(0)


def _byte(mask):
    """A mask as numbers, without the copy that adding booleans to bytes makes."""
    return mask.view(torch.uint8)


def _look_up(levels, index):
    """levels[index]; an index past them is NaN."""
    return torch.cat([levels, levels.new_full((1,), torch.nan)]).index_select(0, index.int())


def _order(x):
    """The permutation that brings x into its order in memory."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return (0, 2, 3, 1)
    return tuple(range(x.dim()))


def _flat(x, order=None):
    """x in one dimension, in its order in memory: a view where x is dense."""
    return x.permute(order or _order(x)).reshape(-1)


def _unflat(flat, shape, order):
    permuted = flat.view([shape[i] for i in order])
    return permuted.permute([order.index(i) for i in range(len(order))])
