"""LCQ: learnable companding quantization (Yamamoto, CVPR 2021, arXiv:2103.07156). Compress, round, expand.

A learned clipping threshold a, and a learned, piecewise linear, increasing function g from [0, 1] onto itself with
S = 16 equal intervals. With theta in R^16 and p = softmax(theta), interval k has slope 16 p_k and offset

    g(v) = 16 p_k (v - k/16) + (p_0 + ... + p_(k-1)),   k/16 <= v < (k+1)/16

    forward     y = sign(x) a g^-1(round(g(v) Q) / Q),   v = min(|x| / a, 1)
    levels      +-a g^-1(j / Q), j = 0 ... Q
    thresholds  +-a g^-1((j + 1/2) / Q), round half to even
                Q = 2^b - 1 unsigned, 2^(b-1) - 1 signed: 2^b - 1 levels, THREE at 2 bits, where LSQ has four

Gradients pass straight through the rounding. With i the interval of v, and k the interval that the rounded value falls
into in the range of g (slope c_k, offset b_k), all times sign(x):

    dy/dc       a (v - i/16) / c_k for interval i,   - a (round - b_k) / c_k^2 for interval k
    dy/db       a / c_k for interval i,  - a / c_k for interval k
    dy/da       (y - x) / a inside, +-1 outside
    dy/dx       1 inside, 0 outside
    gradient scale sqrt(Q / N), on a and theta

In a cell between neighbouring thresholds and interval ends all of them are linear in x. So two sums per cell are enough
(`per_cell` in `nulsq.quant.op`), `table` below declares what they mean, and single elements are never companded.

Weights are normalized first, and the quantized weight is multiplied by the deviation again (`normalization: lwn`).
Published initialization: `init: const` (a = 3 for weights, 8 for activations), theta = 0. Signed weights of 2 bits have
no theta: with one level on each side there is nothing to compand.

The authors published no code; this file computes what the re-implementation in nuLSQ's repository computes. Like it,
it drops the factor c_i / c_k from dy/dx and dy/da. The re-implementation quantizes |x| for unsigned activations, so
signed inputs get 2^(b+1) - 1 levels; here a signed quantizer of b bits has 2^b - 1.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.op import Table, scale_gradient

INTERVALS = 16


class LCQ(Quantizer):
    """A learned clipping threshold and 16 companding parameters per tensor or per output channel."""

    index, ste = "table", "clip"
    symmetric = True
    normalization = "lwn"

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 **options: Any) -> None:
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        leading = () if channels is None else (channels,)
        self.alpha = nn.Parameter(torch.ones(*leading, 1))
        compands = role == "activation" or bits > 2
        self.theta = nn.Parameter(torch.zeros(*leading, INTERVALS)) if compands else None
        self.reduction = "per_cell" if compands else "total"

    @property
    def segments(self) -> int:  # type: ignore[override]  # the sign may come from data later
        return 0 if self.theta is None else INTERVALS * (2 if self.signed else 1)

    def table(self, elements: int | None = None) -> Table:
        alpha: Tensor = self.alpha
        if elements is not None:
            alpha = scale_gradient(alpha, self.gradient_factor(elements, self.level_range[1]))
        if self.theta is None:
            unit = alpha.detach()
            return Table(gaps=alpha, levels=torch.cat([-unit, 0 * unit, unit], -1),
                         thresholds=torch.cat([-unit / 2, unit / 2], -1))
        theta: Tensor = self.theta
        if elements is not None:
            theta = scale_gradient(theta, self.gradient_factor(elements, self.level_range[1]))
        share = theta.softmax(-1).clamp(min=1e-7)  # a narrower interval would overflow where it divides
        slope, offset = INTERVALS * share, share.cumsum(-1) - share
        with torch.no_grad():
            count = self.level_range[1]
            code = torch.arange(count + 1, dtype=alpha.dtype, device=alpha.device) / count  # j / Q
            level = _expand(code, slope, offset)
            level[..., -1].fill_(1)  # exactly; the sum of the shares may round to another value
            threshold = _expand(code[:-1] + 0.5 / count, slope, offset)
        # The cells of [0, 1], in order: which code and which interval each lies in.
        ends = torch.arange(1, INTERVALS, dtype=alpha.dtype, device=alpha.device) / INTERVALS
        both = torch.cat([threshold, ends.expand(*threshold.shape[:-1], -1)], -1)
        passed = nn.functional.pad((both.argsort(dim=-1, stable=True) < count).long().cumsum(-1), (1, 0))  # thresholds
        i = torch.arange(passed.shape[-1], device=passed.device) - passed
        y, rounded = level.gather(-1, passed), code[passed]
        k = _interval(rounded, offset)

        c_i, c_k = slope.gather(-1, i), slope.gather(-1, k)
        b_i, b_k = offset.gather(-1, i), offset.gather(-1, k)
        a, fixed = alpha.detach(), c_k.detach()
        cell_offset = a * (b_i / fixed + (rounded - b_k) / c_k) + alpha * (y - i / INTERVALS)
        cell_slope = c_i / fixed - alpha / a  # of x from the start of its interval
        levels, thresholds = a * level, _first_above(a * threshold, a, slope, offset, count)
        if self.signed:  # y is an odd function of x
            levels = torch.cat([-levels[..., 1:].flip(-1), levels], -1)  # zero only once
            thresholds = torch.cat([-thresholds.flip(-1), thresholds], -1)
            below = cell_offset + a / INTERVALS * cell_slope  # below zero an interval starts at its outer end
            cell_offset = torch.cat([-below.flip(-1), cell_offset], -1)
            cell_slope = torch.cat([cell_slope.flip(-1), cell_slope], -1)
        return Table(alpha, levels, thresholds, cell_offset, cell_slope)

    def ties_up(self) -> tuple[bool, ...]:
        low, high = self.level_range
        return (False,) * -low + (self.theta is not None,) * high  # a threshold is the first value of the outer level

    def gradient_factor(self, elements: int | None, levels: int, numerator: float = 1.0) -> float:
        return 1.0 if not elements else (levels / elements) ** 0.5

    def set_steps_(self, step: Tensor) -> None:
        self.alpha.copy_((step * self.level_range[1]).view(self.alpha.shape))
        if self.theta is not None:
            self.theta.zero_()

    def positive_parameters(self) -> list[Tensor]:
        return [self.alpha]  # theta may have any sign


def _interval(value: Tensor, offset: Tensor) -> Tensor:
    """Index of the interval of g's range that each value lies in: [..., n] int64 for offsets [..., 16]."""
    value = value.expand(*offset.shape[:-1], value.shape[-1]).contiguous()
    return (torch.searchsorted(offset.contiguous(), value, right=True) - 1).clamp(min=0)


def _expand(value: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """g^-1 of values in [0, 1]."""
    k = _interval(value, offset)
    return (value - offset.gather(-1, k)) / slope.gather(-1, k) + k / INTERVALS


@torch.no_grad()
def _first_above(threshold: Tensor, alpha: Tensor, slope: Tensor, offset: Tensor, count: int) -> Tensor:
    """The smallest float near each threshold [..., n] that rounds up when it is companded in floating point.

    Companding follows the formula above, operation by operation. The computed threshold itself may be a few units in
    the last place away, which changes outputs of a network with millions of elements.
    """
    shape = threshold.shape
    unit = torch.finfo(threshold.dtype).eps / 2
    near = threshold[..., None] * (1 + unit * torch.arange(-8, 9, dtype=threshold.dtype, device=threshold.device))
    v = (near.flatten(-2) / alpha).clamp(max=1)
    i = (v * INTERVALS).long().clamp(max=INTERVALS - 1)
    code = ((slope.gather(-1, i) * (v - i / INTERVALS) + offset.gather(-1, i)) * count).round().view(near.shape)
    above = code > torch.arange(count, dtype=code.dtype, device=code.device)[:, None]
    above[..., -1] = True
    return near.gather(-1, above.to(torch.uint8).argmax(-1, keepdim=True)).view(shape)
