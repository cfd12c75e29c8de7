"""LCQ: learnable companding quantization (Yamamoto, CVPR 2021, arXiv:2103.07156). Compress, round, expand.

A learned clipping threshold a, and a learned, piecewise linear, increasing function g of [0, 1] onto itself, with
S = 16 equal intervals. With theta in R^16 and p = softmax(theta), interval k has slope 16 p_k and offset

    g(v) = 16 p_k (v - k/16) + (p_0 + ... + p_(k-1)),   k/16 <= v < (k+1)/16

    forward     y = sign(x) a g^-1(round(g(v) Q) / Q),   v = min(|x| / a, 1)
    levels      +-a g^-1(j / Q), j = 0 ... Q
    thresholds  +-a g^-1((j + 1/2) / Q), round half to even
                Q = 2^b - 1 unsigned, 2^(b-1) - 1 signed: 2^b - 1 levels, THREE at 2 bits, where LSQ has four

Gradients pass straight through the rounding. With i the interval of v, and k that of y on g's side (its slope c_k,
offset b_k; all times sign(x)):

    dy/dc       a (v - i/16) / c_k for interval i,   - a (round - b_k) / c_k^2 for interval k
    dy/db       a / c_k for interval i,  - a / c_k for interval k
    dy/da       (y - x) / a inside, +-1 outside
    dy/dx       1 inside, 0 outside
    gradient scale sqrt(Q / N), on a and theta

In a cell between neighbouring thresholds and interval ends all of them are linear in x, so two sums a cell are enough
(`per_cell` in `nulsq.quant.op`) and `table` below says what they mean; no element is companded one by one.

Weights are normalized first and the deviation is multiplied back (`normalization: lwn`). Published starts:
`init: const` (a = 3 for weights, 8 for activations), theta = 0. Signed weights of 2 bits have no theta: with one level
a side there is nothing to compand.

There is no authors' code; this is what the re-implementation in nuLSQ's repository computes. It drops the factor
c_i / c_k from dy/dx and dy/da, and so do we. It takes |x| for unsigned activations, so signed inputs get 2^(b+1) - 1
levels; here a signed quantizer of b bits keeps to 2^b - 1 (theirs is ours with one bit more).
"""

import torch
from torch import nn

from nulsq.quant.base import Quantizer
from nulsq.quant.op import Table, scale_gradient

INTERVALS = 16


class LCQ(Quantizer):
    """A learned clipping threshold and 16 companding parameters per tensor or per output channel."""

    index, ste = "table", "clip"
    normalization = "lwn"

    def __init__(self, bits, role, *, signed=None, channels=None, **options):
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        leading = () if channels is None else (channels,)
        self.alpha = nn.Parameter(torch.ones(*leading, 1))
        compands = role == "activation" or bits > 2
        self.theta = nn.Parameter(torch.zeros(*leading, INTERVALS)) if compands else None

    @property
    def reduction(self):
        return "total" if self.theta is None else "per_cell"

    @property
    def segments(self):
        return 0 if self.theta is None else INTERVALS * (2 if self.signed else 1)

    @property
    def level_range(self):
        high = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        return (-high if self.signed else 0), high

    def table(self, elements=None):
        alpha = self.alpha
        if elements is not None:
            alpha = scale_gradient(alpha, self.gradient_factor(elements, self.level_range[1]))
        if self.theta is None:
            unit = alpha.detach()
            return Table(gaps=alpha, levels=torch.cat([-unit, 0 * unit, unit], -1),
                         thresholds=torch.cat([-unit / 2, unit / 2], -1))
        theta = self.theta
        if elements is not None:
            theta = scale_gradient(theta, self.gradient_factor(elements, self.level_range[1]))
        share = theta.softmax(-1).clamp(min=1e-7)  # no interval is so narrow that dividing by it overflows
        slope, offset = INTERVALS * share, share.cumsum(-1) - share
        with torch.no_grad():
            count = self.level_range[1]
            code = torch.arange(count + 1, dtype=alpha.dtype, device=alpha.device) / count
            level = _expand(code, slope, offset)
            level[..., -1].fill_(1)  # exactly, whatever the sum of the shares rounds to
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
            levels, thresholds = (torch.cat([-each.flip(-1), each], -1) for each in (levels, thresholds))
            levels = torch.cat([levels[..., :count], levels[..., count + 1:]], -1)  # zero once
            below = cell_offset + a / INTERVALS * cell_slope  # there an interval starts at its far end
            cell_offset = torch.cat([-below.flip(-1), cell_offset], -1)
            cell_slope = torch.cat([cell_slope.flip(-1), cell_slope], -1)
        return Table(alpha, levels, thresholds, cell_offset, cell_slope)

    def ties_up(self):
        low, high = self.level_range
        return (False,) * -low + (self.theta is not None,) * high  # a threshold is the first number of the outer level

    def gradient_factor(self, elements, codes, numerator=1.0):
        return (codes / elements) ** 0.5

    def set_steps_(self, step):
        self.alpha.copy_((step * self.level_range[1]).view(self.alpha.shape))
        if self.theta is not None:
            self.theta.zero_()

    def positive_parameters(self):
        return [self.alpha]  # theta is free


def _interval(value, offset):
    """Index of the interval of g's range that each value lies in: [..., n] int64 for offsets [..., 16]."""
    value = value.expand(*offset.shape[:-1], value.shape[-1]).contiguous()
    return (torch.searchsorted(offset.contiguous(), value, right=True) - 1).clamp(min=0)


def _expand(value, slope, offset):
    """g^-1 of values in [0, 1]."""
    k = _interval(value, offset)
    return (value - offset.gather(-1, k)) / slope.gather(-1, k) + k / INTERVALS


@torch.no_grad()
def _first_above(threshold, alpha, slope, offset, count):
    """The smallest number that rounds up at each threshold [..., n] when it is companded in floating point as written
    above, operation by operation: the threshold itself rounds otherwise by a few units in the last place, and a network
    of millions of elements shows that."""
    shape = threshold.shape
    unit = torch.finfo(threshold.dtype).eps / 2
    near = threshold[..., None] * (1 + unit * torch.arange(-8, 9, dtype=threshold.dtype, device=threshold.device))
    v = (near.flatten(-2) / alpha).clamp(max=1)
    i = (v * INTERVALS).long().clamp(max=INTERVALS - 1)
    code = ((slope.gather(-1, i) * (v - i / INTERVALS) + offset.gather(-1, i)) * count).round().view(near.shape)
    above = code > torch.arange(count, dtype=code.dtype, device=code.device)[:, None]
    above[..., -1] = True
    return near.gather(-1, above.to(torch.uint8).argmax(-1, keepdim=True)).view(shape)
