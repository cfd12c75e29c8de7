"""MinMax: a uniform grid over [-m, m] or [0, m] with m = max|x|; nothing is learned. For 8-bit first and last layers.

    levels      k m / Qp, k = -Qp ... Qp signed, 0 ... Qp unsigned (so 2^b - 1 levels when signed)
    thresholds  (k + 1/2) m / Qp, round half to even
    dy/dx       1 inside, 0 outside

For weights, m comes from the weight itself in every forward pass. For activations the option `range` decides:

    running    m is a moving average of max|x| over batches (weight of the new one: `momentum`), kept in the state dict.
               Forward uses m as it was before the step; the batch's maximum, over all ranks, enters after the step.
               A batch with infinite or NaN values does not enter.
    static     m as calibration measured it
    dynamic    m of the current batch, also in evaluation: not deployable, and several ranks differ from one
    reference  as `dynamic`, with max(x) instead of max|x| and no clamp, as in the authors' code; for parity only.
               With a largest weight of 1, a weight of -3 has code -381 at 8 bits.
"""

from typing import Any

import torch
from torch import Tensor

from nulsq.quant.base import Quantizer
from nulsq.quant.calibration.initial_step import SMALLEST_STEP
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import Table, fake_quantize

RANGES = ("running", "static", "dynamic", "reference")


class MinMax(Quantizer):
    """Uniform grid over the observed range."""

    index, ste, reduction = "uniform", "clip", "none"
    symmetric = True
    largest: Tensor
    seen: Tensor

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 range: str = "running", momentum: float = 0.1, **options: Any) -> None:
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        if range not in RANGES:
            raise ValueError(f"minmax: range = {range!r}, allowed: {', '.join(RANGES)}")
        self.momentum = momentum
        self.range = "dynamic" if role == "weight" and range != "reference" else range
        self.register_buffer("largest", torch.ones((1,) if channels is None else (channels, 1)))  # m
        self.register_computed_buffers()

    def computed_buffers(self) -> dict[str, Tensor]:
        # max|x| since the last step
        return {"seen": torch.zeros((1,) if self.channels is None else (self.channels, 1))}

    def table(self, elements: int | None = None) -> Table:
        return self._table_for(self.largest)

    def _table_for(self, largest: Tensor) -> Table:
        return Table(gaps=(largest / self.level_range[1]).clamp(min=SMALLEST_STEP))

    def forward(self, x: Tensor) -> Tensor:
        self.prepare_()
        if self.range == "reference":
            step = x.detach().max() / self.level_range[1]
            y = torch.round(x.detach() / step) * step
            return x + (y - x).detach()
        largest = self.largest
        if self.range == "dynamic" and x.numel():
            largest = self._largest_of(x)
            if self.training:  # not in evaluation: transforms of torch.func forbid writes to buffers
                self.largest.copy_(largest)
        elif self.range == "running" and self.training and x.numel():
            largest_of_batch = self._largest_of(x)
            self.seen.copy_(torch.where(largest_of_batch.isfinite(), largest_of_batch.maximum(self.seen), self.seen))
        # `_table_for` copies the running range, which changes in place after the step: backward needs the forward's
        # values.
        return fake_quantize(x, self._table_for(largest), self.rule())

    def encode(self, x: Tensor) -> Tensor:
        if self.range == "reference":
            raise ValueError("minmax: range = reference has no level indices: it does not clamp, it is for parity only")
        self.set_range_(x)
        return super().encode(x)

    @torch.no_grad()
    def set_range_(self, x: Tensor) -> None:
        if self.range == "dynamic" and x.numel() and torch.isfinite(x).all():
            self.largest.copy_(self._largest_of(x))

    def _largest_of(self, x: Tensor) -> Tensor:
        x = x.detach().abs()
        largest = x.amax().view(1) if self.channels is None else x.flatten(1).amax(1, keepdim=True)
        return largest.to(self.largest)

    @torch.no_grad()
    def reset_(self, statistics: Statistics, init: str | None = None) -> None:
        super().reset_(statistics, init)
        self.largest.copy_(statistics.largest.to(self.largest).view(self.largest.shape))
        self.seen.zero_()

    def set_steps_(self, step: Tensor) -> None:
        pass  # nothing is learned; `reset_` sets the range

    @torch.no_grad()
    def after_step_(self) -> None:
        """Update the running range by the maximum since the last step, which is reduced over the ranks already."""
        if self.range == "running":
            new = torch.lerp(self.largest, self.seen, self.momentum)
            self.largest.copy_(torch.where(self.seen > 0, new, self.largest))
            self.seen.zero_()
