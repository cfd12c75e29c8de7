"""Fake quantization in plain PyTorch: the definition that every faster form is compared with.

Levels l_0 < l_1 < ... < l_K with a threshold between each neighbouring pair. Forward: y is the level of the
interval that x falls into. Backward, with the straight-through estimator, for the gap g_k = l_k - l_{k-1}:

    inside the range   round(u) - u = (y - x) / g_k,  u = (x - l_{k-1}) / g_k,   so
    dL/dg_k = V_k / g_k,  V_k = sum over x in gap k of dy (y - x)
    beyond it          y is the end level: the sum of the gaps from zero to there, so to each of those
    dL/dg_k += sum over x > l_K of dy, above zero          dL/dg_k -= sum over x < l_0 of dy, below zero
    dL/dx   = dy inside the range, 0 outside

This is the published rule of nuLSQ (one step per gap), of LSQ (all gaps are one step, so their gradients add
up, and the end levels are multiples of it) and of every other method whose gaps are a function of its parameters:
the quantizer builds `gaps` from its parameters with ordinary tensor operations and autograd carries the gradient
on, over at most 2^bits numbers. Only x and the table are kept for backward; y and the gap are computed again.

A method that bends x before it rounds (LCQ) has more places where its gradient changes: also the ends of S equal
segments of the range. Thresholds and segment ends cut the range into K + S cells, numbered level index + segment.
In each the gradient with respect to the parameters is linear in x, so `per_cell` returns two sums for each cell,

    dL/doffset_m = sum over x in cell m of dy     dL/dslope_m = sum over x in cell m of dy (x - start of its segment)

and the quantizer says by its `offset` and `slope` what they mean for its parameters.

Everything is written as unrolled elementwise comparisons, because that is what a compiler fuses into one pass.
Comparisons, tables and sums are in float32, in float64 where x or the table is; y and dx have the type of x, the
table's gradients that of the table.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """What a quantizer's parameters mean. `...` is empty (per tensor) or one dimension of C channels.

    `gaps`, `offset` and `slope` carry the gradient, `levels` and `thresholds` only values. With
    `Rule.index == "uniform"` the levels are `(code + shift) * gaps`, and `levels`, `thresholds` are None.
    """

    gaps: Tensor  # [..., K] where Rule.reduction is "per_gap"; else [..., 1], a unit that all levels are multiples of
    levels: Tensor | None = None  # [..., K+1], ascending
    thresholds: Tensor | None = None  # [..., K], ascending
    offset: Tensor | None = None  # [..., K+S], for Rule.reduction "per_cell"; only its gradient is used
    slope: Tensor | None = None  # likewise


class Affine(NamedTuple):
    """What x goes through before it is quantized, where a batch norm is left to the operation: (x - center) * scale +
    shift; [C] each, over dimension 1 of x. The first three carry the gradient.

    inverse: [C] without gradient, where center is the mean of x itself and scale is weight * inverse, with inverse =
    1 / sqrt(variance of x + eps). Then the gradient of x goes through both, too, and center gets none.
    """

    center: Tensor
    scale: Tensor
    shift: Tensor
    inverse: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """In plain PyTorch, as every kernel computes it: one multiplication and one addition, in the type of scale."""
        center, scale, x = self.center, self.scale, x.to(self.scale.dtype)
        if self.inverse is not None:  # d inverse / d var = -inverse^3 / 2; no bit of the values changes
            var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
            center = center + (mean - mean.detach())
            scale = scale - 0.5 * scale * self.inverse**2 * (var - var.detach())
        return x * along_channels(scale, x) + along_channels(self.shift - center * scale, x)


class Rule(NamedTuple):
    """Static switches of a quantizer: plain Python values, so that a compiler specializes on them."""

    index: str  # "uniform": round half to even of x / step; "table": compare with the thresholds
    ste: str  # dL/dx: "clip" passes low <= x <= high; "clip_open" low < x < high; "half" 0.5 at both ends; "none" all
    reduction: str  # gradient of the gaps: "none", "total" (of the unit), "per_gap" (one each); or "per_cell", where
    # the unit gets what lies beyond the ends and `offset` and `slope` what lies inside
    level_range: tuple[int, int]  # lowest and highest level number relative to zero; K = codes[1] - codes[0]
    ties_up: tuple[bool, ...] = ()  # per threshold: does x == threshold belong to the upper level?
    shift: float = 0.0  # "uniform": 0 has a level at zero, 0.5 has one on either side of it
    segments: int = 0  # "per_cell": S
    relu: bool = False  # x counts as max(x, 0): the ReLU before the quantizer is left to this operation


def under_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) is active.

    No public function says so: `torch.func` exposes none, and the type of a wrapped tensor is Tensor.
    """
    return torch._C._are_functorch_transforms_active()


def encode(x: Tensor, table: Table, rule: Rule) -> Tensor:
    """Level index of each element, by the very comparisons that `fake_quantize` makes. int64, shape of x."""
    x, table = prepared(x, table, rule)
    if rule.index == "uniform":
        return (_code(x, table, rule) - rule.level_range[0]).long()
    return _index(x, table, rule)


class Oracle(torch.autograd.Function):
    """x -> its level by `rule`; same shape and type. A 2-D table runs over dimension 0 of x."""

    generate_vmap_rule = True  # forward and backward are plain operations, which torch.vmap can batch

    @staticmethod
    def forward(x, gaps, levels, thresholds, offset, slope, rule):
        return quantize(x, Table(gaps, levels, thresholds, offset, slope), rule)[0].to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.rule = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        x, *table = ctx.saved_tensors
        rule = sums_asked_for(ctx.rule, ctx.needs_input_grad)
        dx, dgaps, doffset, dslope = gradients(x, dy, Table(*table), rule)
        return dx, dgaps, None, None, doffset, dslope, None


def gradients(x: Tensor, dy: Tensor, table: Table, rule: Rule) -> tuple[Tensor | None, ...]:
    """dx and the gradients of gaps, offset and slope; None where the rule's reduction has none."""
    stored, kind = x.dtype, table.gaps.dtype
    y, x, table = quantize(x, table, rule)
    dy = dy.to(x.dtype)

    if rule.index == "uniform":  # compared in steps, which keeps its range that of the rounding
        at, low, high = x / _column(table.gaps, 0, x), *end_codes(rule)
    else:
        at, low, high = x, _column(table.levels, 0, x), _column(table.levels, -1, x)
    inside = (at >= low) & (at <= high)
    dx = _input_gradient(dy, at, low, high, inside, rule.ste)
    dx = (torch.where(x <= 0, 0, dx) if rule.relu else dx).to(stored)
    if rule.reduction == "none":
        return dx, *(None,) * 3

    channels = table.gaps.dim() == 2
    below = _sum(torch.where(at < low, dy, 0), channels)
    above = _sum(torch.where(at > high, dy, 0), channels)
    if rule.reduction == "per_cell":
        number, start = segment(x, low, high, rule)
        cell = _index(x, table, rule) + number
        weights = [torch.where(inside, each, 0) for each in (dy, dy * (x - start))]
        offset, slope = (torch.cat([_sum(torch.where(cell == m, each, 0), channels)
                                    for m in range(table.offset.shape[-1])], dim=-1).to(kind) for each in weights)
        return dx, gap_gradient(0.0, below, above, table, rule).to(kind), offset, slope
    error = torch.where(inside, dy * (y - x), 0)
    if rule.reduction == "total":
        errors = _sum(error, channels)
    else:  # x lies in gap k, that is l_{k-1} < x <= l_k
        errors = torch.cat([
            _sum(torch.where((x > _column(table.levels, k, x)) & (x <= _column(table.levels, k + 1, x)), error, 0),
                 channels)
            for k in range(rule.level_range[1] - rule.level_range[0])
        ], dim=-1)
    return dx, gap_gradient(errors / table.gaps, below, above, table, rule).to(kind), None, None


def gap_gradient(errors: Tensor | float, below: Tensor, above: Tensor, table: Table, rule: Rule) -> Tensor:
    """dL/dgaps of sums: [..., K or 1] of dy (y - x) / gap inside the range, [..., 1] of dy below it and above it.

    In double: what the ends get may be large and cancel.
    """
    below, above = below.double(), above.double()
    if rule.reduction != "per_gap":
        low, high = (end_codes(rule) if rule.index == "uniform" else
                     (table.levels[..., end] / table.gaps for end in (slice(1), slice(-1, None))))
        return errors + low * below + high * above
    if not rule.level_range[0]:
        return errors + above
    far = below.shape[:-1]
    return errors + torch.cat([-below.expand(*far, -rule.level_range[0]), above.expand(*far, rule.level_range[1])], -1)


def quantize(x, table, rule):
    """y, and x (behind its ReLU) and table in the type that is computed in."""
    x, table = prepared(x, table, rule)
    if rule.index == "uniform":
        return (_code(x, table, rule) + rule.shift) * _column(table.gaps, 0, x), x, table
    y = torch.where(x == x, _column(table.levels, 0, x), x)  # NaN in, NaN out
    for k, up in enumerate(rule.ties_up):
        y = torch.where(_above(x, _column(table.thresholds, k, x), up), _column(table.levels, k + 1, x), y)
    return y, x, table


def end_codes(rule: Rule) -> tuple[float, float]:
    """Lowest and highest level of a uniform grid in units of its step."""
    return rule.level_range[0] + rule.shift, rule.level_range[1] + rule.shift


def segment(x: Tensor, low: Tensor, high: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Number (int64) and start of the equal segment of the range that x lies in; the end ones for what lies outside."""
    width = (high - low) / rule.segments
    number = ((x - low) / width).floor().clamp(0, rule.segments - 1).nan_to_num(0.0)
    return number.long(), low + number * width


def _index(x, table, rule):
    index = torch.zeros_like(x, dtype=torch.int64)
    for k, up in enumerate(rule.ties_up):
        index = index + _above(x, _column(table.thresholds, k, x), up)  # not in place: vmap may batch the table alone
    return index


def _code(x, table, rule):
    return (x / _column(table.gaps, 0, x) - rule.shift).round().clamp(*rule.level_range)


def _above(x, threshold, tie_goes_up):
    return x >= threshold if tie_goes_up else x > threshold


def _input_gradient(dy, x, low, high, inside, ste):
    if ste == "none":
        return dy
    if ste == "clip":
        return torch.where(inside, dy, 0)
    open_inside = torch.where((x > low) & (x < high), dy, 0)
    if ste == "clip_open":
        return open_inside
    return open_inside + torch.where((x == low) | (x == high), 0.5 * dy, 0)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """[C] in the shape that broadcasts over dimension 1 of x."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _column(table: Tensor, k: int, x: Tensor) -> Tensor:
    """Column k of a per-tensor or per-channel table, in the shape that broadcasts over x."""
    column = table[..., k]
    return column if column.dim() == 0 else column.view(-1, *[1] * (x.dim() - 1))


def _sum(values, channels):
    """Sum over the tensor -> [1], or over all but the channel dimension -> [C, 1]."""
    return values.flatten(1).sum(1, keepdim=True) if channels else values.sum().view(1)


def computed_in(x: Tensor, table: Table | None = None) -> torch.dtype:
    """float32, or float64 where x or the table is."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return kind if table is None else torch.promote_types(kind, table.gaps.dtype)


def prepared(x: Tensor, table: Table, rule: Rule) -> tuple[Tensor, Table]:
    """x, behind its ReLU, and the table in the type that is computed in."""
    kind = computed_in(x, table)
    x = x.to(kind)
    return x.relu() if rule.relu else x, Table(*(t if t is None else t.detach().to(kind) for t in table))


def sums_asked_for(rule: Rule, needs_input_grad: tuple[bool, ...]) -> Rule:
    """The rule without sums where no parameter asks for a gradient; x is the first of the inputs."""
    return rule if any(needs_input_grad[1:]) else rule._replace(reduction="none")


def scale_gradient(parameter: Tensor, factor) -> Tensor:
    """The same values; the gradient is multiplied by `factor` (a float or a tensor that broadcasts)."""
    fixed = parameter.detach()
    return fixed + (parameter - fixed) * factor  # the difference is zero: not a bit of the value changes
