"""A histogram with fixed bins, so that histograms of batches and ranks can be added.

Bins are logarithmic: 32 per octave of |x| from 2^-30 to 2^40, for either sign, and one for zero. Values of a bin differ
by at most 3 percent. Each bin keeps its count and its exact sum in float64.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST, HIGHEST, PER_OCTAVE = -30, 40, 32
SIDE = (HIGHEST - LOWEST) * PER_OCTAVE  # bins of one sign
BINS = 2 * SIDE + 1
LARGEST = 2.0**HIGHEST


@dataclass
class Histogram:
    """Counts and sums of the bins, in ascending order of x: float64 on the CPU, [BINS] or, per channel, [C, BINS]."""

    count: Tensor
    total: Tensor

    @classmethod
    def of(cls, x: Tensor, *, per_channel: bool = False) -> "Histogram":
        """Histogram of finite values; with `per_channel`, one for each index of dimension 0."""
        x = x.detach().float()
        x = x.flatten(1) if per_channel else x.reshape(1, -1)
        number = _bin_numbers(x) + torch.arange(len(x), device=x.device)[:, None] * BINS
        count = torch.bincount(number.flatten(), minlength=len(x) * BINS).double()
        total = torch.bincount(number.flatten(), x.flatten().double(), len(x) * BINS)
        shape = (len(x), BINS) if per_channel else (BINS,)
        return cls(count.cpu().view(shape), total.cpu().view(shape))

    def merge(self, other: "Histogram") -> "Histogram":
        return Histogram(self.count + other.count, self.total + other.total)

    def cells(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Count and sum of the values in each interval between ascending thresholds: two [..., K+1].

        thresholds: [..., K], or [..., C, K] per channel; leading dimensions are independent sets of thresholds. Where a
        threshold lies inside a bin, the values of the bin are assumed to be spread evenly.
        """
        ends, thresholds = _bin_ends(), thresholds.to(torch.float64).cpu()
        at = _bin_numbers(thresholds)  # a search among the ends would take most of the time
        left, right = ends[at], ends[at + 1]
        inside = thresholds.clamp(left, right)
        share = (inside - left) / (right - left)  # of the count; `weighted` is the share of the sum
        weighted = torch.where(at == SIDE, share, (inside.square() - left.square()) / (right.square() - left.square()))
        return _between(self.count, self._below[0], at, share), _between(self.total, self._below[1], at, weighted)

    @functools.cached_property
    def _below(self) -> tuple[Tensor, Tensor]:
        """Count and sum of the values below each end of a bin: [..., BINS + 1] each."""
        count, total = (torch.nn.functional.pad(values.cumsum(-1), (1, 0)) for values in (self.count, self.total))
        return count, total


def _between(values: Tensor, running: Tensor, at: Tensor, share: Tensor) -> Tensor:
    """Sums of the bins' values between thresholds that lie at a share of the bins `at`.

    running: sums below each bin.
    """
    running, values = (sums.expand(*at.shape[:-1], -1) for sums in (running, values))
    below = running.gather(-1, at) + share * values.gather(-1, at)
    return torch.cat([torch.zeros_like(running[..., :1]), below, running[..., -1:]], -1).diff(dim=-1)


def _bin_numbers(x: Tensor) -> Tensor:
    """The bin of each value: int64, ascending with x."""
    # A float's bits are sign, exponent and mantissa; with its first five bits the exponent is the number of a bin.
    if x.dtype == torch.float64:
        bits, shift, bias = x.abs().view(torch.int64), 47, 1023
    else:
        bits, shift, bias = x.float().abs().view(torch.int32), 18, 127
    number = ((bits >> shift) - (LOWEST + bias) * PER_OCTAVE).clamp_(-1, SIDE - 1).add_(1)
    return SIDE + torch.where(x < 0, -number, number)


@functools.cache
def _bin_ends() -> Tensor:
    """The BINS + 1 ends of the bins, ascending."""
    steps = 1 + torch.arange(PER_OCTAVE, dtype=torch.float64) / PER_OCTAVE
    positive = torch.cat([2.0**octave * steps for octave in range(LOWEST, HIGHEST)] + [2.0**HIGHEST * steps[:1]])
    return torch.cat([-positive.flip(0), positive])
