"""Mergeable statistics of a tensor: the input of every initializer.

`Statistics` of disjoint samples merge into the statistics of their union, so any number of batches and ranks gives the
numbers of one process. Sums are in float64, so that their order does not change a float32 parameter.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from nulsq.quant.calibration.histogram import Histogram


@dataclass
class Statistics:
    """Sums and extrema of samples, each a float64 tensor on the CPU of shape [] or, per channel, [C].

    The histogram is what the initializer `mse` needs. It costs more than everything else.
    """

    count: Tensor
    total: Tensor
    absolute: Tensor  # sum of |x|
    square: Tensor  # sum of x^2
    low: Tensor
    high: Tensor
    histogram: Histogram | None = None
    default_init: ClassVar[str] = "mse"  # of a quantizer that names no initializer

    @classmethod
    def of(cls, x: Tensor, *, per_channel: bool = False, histogram: bool = True) -> "Statistics":
        """Statistics of x; with `per_channel`, one for each index of dimension 0.

        Raises ValueError for NaN or infinite values: a range learned from them would be meaningless.
        """
        x = x.detach()
        x = x.cpu().double() if x.device.type == "mps" else x.double()  # mps has no float64
        x = x.flatten(1) if per_channel else x.reshape(-1)
        total, low, high = x.sum(-1), x.amin(-1), x.amax(-1)
        if not torch.isfinite(total).all():
            raise ValueError(f"cannot take statistics: {int((~torch.isfinite(x)).sum())} of {x.numel()} values "
                             "are NaN or infinite")
        count = torch.full_like(total, x.shape[-1])
        return cls(count.cpu(), total.cpu(), x.abs().sum(-1).cpu(), x.square().sum(-1).cpu(), low.cpu(), high.cpu(),
                   Histogram.of(x, per_channel=per_channel) if histogram else None)

    def merge(self, other: "Statistics") -> "Statistics":
        return Statistics(self.count + other.count, self.total + other.total, self.absolute + other.absolute,
                          self.square + other.square, torch.minimum(self.low, other.low),
                          torch.maximum(self.high, other.high),
                          self.histogram.merge(other.histogram) if self.histogram and other.histogram else None)

    def over_ranks(self, device: torch.device) -> "Statistics":
        """Statistics of the samples of all ranks; unchanged outside a process group. A collective operation."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        sums = torch.stack([self.count, self.total, self.absolute, self.square]).to(device)
        ends = torch.stack([-self.low, self.high]).to(device)
        dist.all_reduce(sums)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        count, total, absolute, square = sums.cpu()
        ends, histogram = ends.cpu(), None
        if self.histogram is not None:
            both = torch.stack([self.histogram.count, self.histogram.total]).to(device)
            dist.all_reduce(both)
            histogram = Histogram(*both.cpu())
        return Statistics(count, total, absolute, square, -ends[0], ends[1], histogram)

    @property
    def mean_absolute(self) -> Tensor:
        return self.absolute / self.count

    @property
    def mean_square(self) -> Tensor:
        return self.square / self.count

    @property
    def std(self) -> Tensor:
        """Standard deviation with Bessel's correction, as torch.std."""
        centred = self.square - self.total.square() / self.count
        return (centred.clamp(min=0) / (self.count - 1).clamp(min=1)).sqrt()

    @property
    def largest(self) -> Tensor:
        """max |x|"""
        return torch.maximum(self.low.abs(), self.high.abs())


class BatchStatistics(Statistics):
    """Statistics of one tensor in its own precision, by torch's mean and standard deviation.

    For parity with the authors' calibration, where a difference of one ulp moves values across thresholds and changes
    the logits of the network.
    """

    x: Tensor
    default_init = "nmse"

    @classmethod
    def of(cls, x: Tensor, *, per_channel: bool = False, histogram: bool = True) -> "BatchStatistics":
        statistics: Any = super().of(x, per_channel=per_channel, histogram=histogram)
        statistics.x = x.detach().flatten(1) if per_channel else x.detach().reshape(-1)
        return statistics

    @property
    def mean_absolute(self) -> Tensor:
        return self.x.abs().mean(-1)

    @property
    def mean_square(self) -> Tensor:
        return self.x.square().mean(-1)

    @property
    def std(self) -> Tensor:
        return self.x.std(-1)
