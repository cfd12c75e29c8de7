"""Fake quantization in plain PyTorch: the definition that all other forms are compared with.

The levels are l_0 < l_1 < ... < l_K, with a threshold between each neighbouring pair. Forward: y is the level of the
interval that x is in. Backward uses the straight-through estimator, for the gap g_k = l_k - l_{k-1}:

    inside the range   round(u) - u = (y - x) / g_k,  u = (x - l_{k-1}) / g_k,   so
    dL/dg_k = V_k / g_k,  V_k = sum over x in gap k of dL/dy (y - x)
    beyond it          y is the end level: the sum of the gaps from zero to there, so each of those gets
    dL/dg_k += sum over x > l_K of dL/dy, above zero       dL/dg_k -= sum over x < l_0 of dL/dy, below zero
    dL/dx   = dL/dy inside the range, 0 outside

This is the published rule of nuLSQ (one step per gap) and of LSQ (all gaps are one step, so their gradients add up, and
the end levels are multiples of it). It holds for every method whose gaps are a function of its parameters: the
quantizer computes `gaps` from its parameters with ordinary tensor operations, and autograd continues the gradient over
at most 2^bits numbers. Only x and the table are kept for backward, which computes y and the gap again.

A method that bends x before it rounds (LCQ) has more points where its gradient changes: also the ends of S equal
segments of the range. Thresholds and segment ends cut the range into K + S cells, numbered level index + segment. In
each cell the gradient of the parameters is linear in x, so `per_cell` returns two sums for each cell,

    dL/doffset_m = sum over x in cell m of dL/dy
    dL/dslope_m  = sum over x in cell m of dL/dy (x - start of its segment)

and the quantizer's `offset` and `slope` define what they mean for its parameters.

All operations are unrolled elementwise comparisons, which a compiler can fuse into one pass. Comparisons, tables and
sums are in float32, or in float64 if x or the table is. y and the gradient of x have the type of x; gradients of the
table have the type of the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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

    def map(self, function: Callable[[Tensor], Tensor]) -> "Table":
        """The table with `function` applied to each tensor."""
        return Table(*(None if t is None else function(t) for t in self))  # type: ignore[arg-type]

    def values(self) -> tuple[Tensor, Tensor]:
        """Levels and thresholds, for `Rule.index == "table"`."""
        assert self.levels is not None and self.thresholds is not None
        return self.levels, self.thresholds


class Affine(NamedTuple):
    """A batch norm before the quantizer: (x - mean) * scale + bias, with [C] each, over dimension 1 of x.

    The first three carry the gradient. scale is the batch norm's weight times rstd.

    rstd: 1 / sqrt(variance of x + eps), [C] without gradient, if mean and rstd are the statistics of x itself. Then
    the gradient of x also goes through the statistics, and `mean` gets none. None if the statistics are constants.
    """

    mean: Tensor
    scale: Tensor
    bias: Tensor
    rstd: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Affine":
        """The map with `function` applied to each tensor."""
        return Affine(*(None if t is None else function(t) for t in self))  # type: ignore[arg-type]

    def of(self, x: Tensor) -> Tensor:
        """In plain PyTorch, rounded as in the kernels: one multiplication and one addition, in the type of scale."""
        mean, scale, x = self.mean, self.scale, x.to(self.scale.dtype)
        if self.rstd is not None:  # d rstd / d var = -rstd^3 / 2; the added terms are zero and change no value
            batch_var, batch_mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
            mean = mean + (batch_mean - batch_mean.detach())
            scale = scale - 0.5 * scale * self.rstd**2 * (batch_var - batch_var.detach())
        return x * along_channels(scale, x) + along_channels(self.bias - mean * scale, x)


class Rule(NamedTuple):
    """Static switches of a quantizer: plain Python values, so that a compiler specializes on them."""

    # "uniform": round half to even of x / step; "table": compare with the thresholds
    index: str  # type: ignore[assignment]  # hides tuple.index
    ste: str  # where dL/dx is dL/dy: "clip" low <= x <= high; "none" everywhere; "clip_open" low < x < high; "half" as
    # clip_open, and half of it at both ends. The last two have the reference form only
    reduction: str  # gradient of the gaps: "none", "total" (of the unit), "per_gap" (one each); or "per_cell": the unit
    # gets the part beyond the ends, `offset` and `slope` get the part inside
    level_range: tuple[int, int]  # lowest and highest level number relative to zero; K is their difference
    ties_up: tuple[bool, ...] = ()  # per threshold: whether x == threshold belongs to the upper level
    shift: float = 0.0  # "uniform": 0 puts a level at zero, 0.5 one on either side of it
    segments: int = 0  # "per_cell": S
    relu: bool = False  # x counts as max(x, 0): the operation includes the ReLU before the quantizer


def under_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp) is active.

    Private API: `torch.func` has no public function for this, and a wrapped tensor's type is Tensor.
    """
    return torch._C._are_functorch_transforms_active()


class Reference(torch.autograd.Function):
    """x -> its level by `rule`; same shape and type. A 2-D table has a row for each index of dimension 0 of x."""

    generate_vmap_rule = True  # forward and backward are plain operations, which torch.vmap can batch

    @staticmethod
    def forward(x: Tensor, gaps: Tensor, levels: Tensor | None, thresholds: Tensor | None, offset: Tensor | None,
                slope: Tensor | None, rule: Rule) -> Tensor:
        return quantize(x, Table(gaps, levels, thresholds, offset, slope), rule)[0].to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.rule = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *table = ctx.saved_tensors
        rule = without_unused_sums(ctx.rule, ctx.needs_input_grad)
        grad_input, grad_gaps, grad_offset, grad_slope = gradients(x, grad_output, Table(*table), rule)
        return grad_input, grad_gaps, None, None, grad_offset, grad_slope, None


def quantize(x: Tensor, table: Table, rule: Rule) -> tuple[Tensor, Tensor, Table]:
    """y, x (after its ReLU) and the table, in the computation type."""
    x, table = prepare(x, table, rule)
    if rule.index == "uniform":
        return (_code(x, table, rule) + rule.shift) * _column(table.gaps, 0, x), x, table
    levels, thresholds = table.values()
    y = torch.where(x == x, _column(levels, 0, x), x)  # NaN in, NaN out
    for k, up in enumerate(rule.ties_up):
        y = torch.where(_above(x, _column(thresholds, k, x), up), _column(levels, k + 1, x), y)
    return y, x, table


def encode(x: Tensor, table: Table, rule: Rule) -> Tensor:
    """Level index of each element, by the comparisons that `fake_quantize` makes. int64, shape of x."""
    x, table = prepare(x, table, rule)
    if rule.index == "uniform":
        return (_code(x, table, rule) - rule.level_range[0]).long()
    return _index(x, table, rule)


def gradients(x: Tensor, grad_output: Tensor, table: Table, rule: Rule) -> tuple[Tensor | None, ...]:
    """Gradients of x, gaps, offset and slope; None where the rule's reduction has none."""
    x_dtype, table_dtype = x.dtype, table.gaps.dtype
    y, x, table = quantize(x, table, rule)
    grad_output = grad_output.to(x.dtype)

    low: Any  # a number or a tensor
    high: Any
    if rule.index == "uniform":  # compared in units of the step, so that the range is that of the rounding
        at = x / _column(table.gaps, 0, x)
        low, high = end_codes(rule)
    else:
        levels, _ = table.values()
        at, low, high = x, _column(levels, 0, x), _column(levels, -1, x)
    inside = (at >= low) & (at <= high)
    grad_input = _input_gradient(grad_output, at, low, high, inside, rule.ste)
    grad_input = (torch.where(x <= 0, 0, grad_input) if rule.relu else grad_input).to(x_dtype)
    if rule.reduction == "none":
        return grad_input, *(None,) * 3

    channels = table.gaps.dim() == 2
    below = _sum(torch.where(at < low, grad_output, 0), channels)
    above = _sum(torch.where(at > high, grad_output, 0), channels)
    if rule.reduction == "per_cell":
        number, start = segment(x, low, high, rule)
        cell = _index(x, table, rule) + number
        weights = [torch.where(inside, weight, 0) for weight in (grad_output, grad_output * (x - start))]
        cells = range(len(rule.ties_up) + rule.segments)
        grad_offset, grad_slope = (
            torch.cat([_sum(torch.where(cell == m, weight, 0), channels) for m in cells], dim=-1).to(table_dtype)
            for weight in weights)
        grad_gaps = gap_gradient(0.0, below, above, table, rule).to(table_dtype)
        return grad_input, grad_gaps, grad_offset, grad_slope
    error = torch.where(inside, grad_output * (y - x), 0)
    if rule.reduction == "total":
        errors = _sum(error, channels)
    else:  # x is in gap k if l_{k-1} < x <= l_k
        errors = torch.cat([
            _sum(torch.where((x > _column(levels, k, x)) & (x <= _column(levels, k + 1, x)), error, 0), channels)
            for k in range(rule.level_range[1] - rule.level_range[0])
        ], dim=-1)
    return grad_input, gap_gradient(errors / table.gaps, below, above, table, rule).to(table_dtype), None, None


def gap_gradient(errors: Tensor | float, below: Tensor, above: Tensor, table: Table, rule: Rule) -> Tensor:
    """dL/dgaps from sums: [..., K or 1] of dL/dy (y - x) / gap inside the range, [..., 1] of dL/dy below and above it.

    In double, because the sums beyond the ends may be large and cancel.
    """
    below, above = below.double(), above.double()
    if rule.reduction != "per_gap":
        low, high = (end_codes(rule) if rule.index == "uniform" else
                     (table.values()[0][..., end] / table.gaps for end in (slice(1), slice(-1, None))))
        return errors + low * below + high * above
    if not rule.level_range[0]:
        return errors + above
    shape = below.shape[:-1]
    return errors + torch.cat([-below.expand(*shape, -rule.level_range[0]), above.expand(*shape, rule.level_range[1])],
                              dim=-1)


def end_codes(rule: Rule) -> tuple[float, float]:
    """Lowest and highest level of a uniform grid, in units of its step."""
    return rule.level_range[0] + rule.shift, rule.level_range[1] + rule.shift


def segment(x: Tensor, low: Tensor, high: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Number (int64) and start of the equal segment of the range that x is in; outside, those of the end segments."""
    width = (high - low) / rule.segments
    number = ((x - low) / width).floor().clamp(0, rule.segments - 1).nan_to_num(0.0)
    return number.long(), low + number * width


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """[C] in the shape that broadcasts over dimension 1 of x."""
    return values.view(-1, *[1] * (x.dim() - 2))


def compute_dtype(x: Tensor, table: Table | None = None) -> torch.dtype:
    """float32, or float64 if x or the table is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return dtype if table is None else torch.promote_types(dtype, table.gaps.dtype)


def prepare(x: Tensor, table: Table, rule: Rule) -> tuple[Tensor, Table]:
    """x, after its ReLU, and the table in the computation type."""
    dtype = compute_dtype(x, table)
    x = x.to(dtype)
    return x.relu() if rule.relu else x, table.map(lambda t: t.detach().to(dtype))


def without_unused_sums(rule: Rule, needs_input_grad: tuple[bool, ...]) -> Rule:
    """The rule with reduction "none" if no parameter needs a gradient. The first of the inputs is x."""
    return rule if any(needs_input_grad[1:]) else rule._replace(reduction="none")


def scale_gradient(parameter: Tensor, factor: float | Tensor) -> Tensor:
    """The same values; the gradient is multiplied by `factor` (a float or a tensor that broadcasts)."""
    fixed = parameter.detach()
    return fixed + (parameter - fixed) * factor  # the difference is zero: no value changes


def _index(x: Tensor, table: Table, rule: Rule) -> Tensor:
    index, (_, thresholds) = torch.zeros_like(x, dtype=torch.int64), table.values()
    for k, up in enumerate(rule.ties_up):
        index = index + _above(x, _column(thresholds, k, x), up)  # not in place: vmap may batch only the table
    return index


def _code(x: Tensor, table: Table, rule: Rule) -> Tensor:
    return (x / _column(table.gaps, 0, x) - rule.shift).round().clamp(*rule.level_range)


def _above(x: Tensor, threshold: Tensor, tie_goes_up: bool) -> Tensor:
    return x >= threshold if tie_goes_up else x > threshold


def _input_gradient(grad_output: Tensor, at: Tensor, low: Tensor | float, high: Tensor | float, inside: Tensor,
                    ste: str) -> Tensor:
    if ste == "none":
        return grad_output
    if ste == "clip":
        return torch.where(inside, grad_output, 0)
    strictly_inside = torch.where((at > low) & (at < high), grad_output, 0)
    if ste == "clip_open":
        return strictly_inside
    return strictly_inside + torch.where((at == low) | (at == high), 0.5 * grad_output, 0)


def _column(table: Tensor, k: int, x: Tensor) -> Tensor:
    """Column k of a per-tensor or per-channel table, in the shape that broadcasts over x."""
    column = table[..., k]
    return column if column.dim() == 0 else column.view(-1, *[1] * (x.dim() - 1))


def _sum(values: Tensor, channels: bool) -> Tensor:
    """Sum over the tensor -> [1], or over all but the channel dimension -> [C, 1]."""
    return values.flatten(1).sum(1, keepdim=True) if channels else values.sum().view(1)
