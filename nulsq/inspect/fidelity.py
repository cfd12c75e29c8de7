"""Fidelity of a quantizer: clipping, noise, use of its levels. Needs torch alone.

    clipped   share of values below the lowest or above the highest level
    SNR       10 log10(sum x^2 / sum (x - Q(x))^2) in dB, where x is the quantizer's input (normalized weights)
    entropy   - sum p log2 p over the levels, where p is the share of values on a level: information in the b bits

Counts and sums include all values, in float64. Pictures use a seeded random sample; other values are not kept.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nulsq.quant.base import Quantizer

SAMPLE = 100_000  # values kept for a histogram
CHUNK = 1 << 22  # values converted to float64 at a time


@dataclass
class Fidelity:
    """One quantizer of a layer and measurements of the values that were passed to `add` so far."""

    quantizer: Quantizer
    count: int = 0  # values
    below: int = 0  # of them, under the lowest level
    above: int = 0  # of them, over the highest level
    signal: float = 0.0  # sum x^2
    noise: float = 0.0  # sum (x - Q(x))^2
    not_finite: int = 0  # NaN or infinite values; a tensor that has one is not measured
    levels: Tensor | None = None  # [L] or, per channel, [C, L], as of the last tensor; on the CPU
    thresholds: Tensor | None = None  # [L-1] or [C, L-1]
    occupancy: Tensor | None = None  # values on each level, over all channels: int64 [L]
    sample: Tensor = field(default_factory=lambda: torch.empty(0))  # some of the values; per channel, divided by `unit`
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Measure a tensor of values of any shape; for a per-channel quantizer, [C, ...]."""
        self.quantizer.set_range_(x)
        y = self.quantizer.forward(x)  # not a call: it may be called from a hook of the quantizer
        self.levels, self.thresholds = self.quantizer.levels().cpu(), self.quantizer.thresholds().cpu()
        rows = self.quantizer.channels or 1
        x, y = x.reshape(rows, -1), y.reshape(rows, -1)
        not_finite = int((~torch.isfinite(x)).sum())
        self.not_finite += not_finite
        if not_finite:
            return
        self._update_sample(x)
        self.count += x.numel()
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # mps has no float64
        levels = self.levels.to(device, torch.float64).view(rows, -1)
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        occupancy = torch.zeros(levels.shape[1], dtype=torch.int64, device=device)
        columns = max(1, CHUNK // rows)
        for part, quantized in zip(x.split(columns, 1), y.split(columns, 1), strict=True):
            part, quantized = part.to(device, torch.float64), quantized.to(device, torch.float64)
            self.below += int((part < levels[:, :1]).sum())
            self.above += int((part > levels[:, -1:]).sum())
            self.signal += float(part.square().sum())
            self.noise += float((part - quantized).square().sum())
            # The type of y may round a level, so take the nearest one.
            index = torch.searchsorted(middle, quantized.contiguous())
            occupancy += torch.bincount(index.flatten(), minlength=len(occupancy))
        self.occupancy = occupancy.cpu() + (0 if self.occupancy is None else self.occupancy)

    @property
    def gaps(self) -> Tensor:
        """Step sizes, the distances between neighbouring levels: [L-1] or [C, L-1]. Only after `add`."""
        assert self.levels is not None
        return self.levels.diff(dim=-1)

    @property
    def unit(self) -> Tensor:
        """Mean step size, [] or [C]: the unit in which different channels are compared. Only after `add`."""
        return self.gaps.mean(-1)

    @property
    def clipped(self) -> float:
        return (self.below + self.above) / self.count if self.count else math.nan

    @property
    def snr(self) -> float:
        """In dB; infinite without noise, NaN without a signal."""
        if not self.signal:
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    @property
    def entropy(self) -> float:
        """In bits; at most the quantizer's bits."""
        if not self.count or self.occupancy is None:
            return math.nan
        share = self.occupancy[self.occupancy > 0].double() / self.count
        return max(0.0, float(-(share * share.log2()).sum()))

    @property
    def used(self) -> int:
        """Number of levels with at least one value."""
        return 0 if self.occupancy is None else int((self.occupancy > 0).sum())

    def _update_sample(self, x: Tensor) -> None:
        """Each tensor's share of the sample is its share of all values so far."""
        new, total = x.numel(), self.count + x.numel()
        if total <= SAMPLE:
            index = torch.arange(new)
        else:
            count = max(1, round(SAMPLE * new / total))
            index = torch.randint(new, (count,), generator=self.generator)
            self.sample = self.sample[torch.randperm(len(self.sample), generator=self.generator)[:SAMPLE - count]]
        values = x.reshape(-1)[index.to(x.device)].float().cpu()
        if self.quantizer.channels:
            values /= self.unit[index // x.shape[1]]
        self.sample = torch.cat([self.sample, values])
