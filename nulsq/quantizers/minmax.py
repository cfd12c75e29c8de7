"""MinMax: a uniform grid over [-m, m] or [0, m] with m = max|x|; nothing is learned. For 8-bit first and last layers.

    levels      k m / Qp, k = -Qp ... Qp signed, 0 ... Qp unsigned (so 2^b - 1 levels when signed)
    thresholds  (k + 1/2) m / Qp, round half to even
    dy/dx       1 inside, 0 outside

For weights, m comes from the weight itself in every forward pass. For activations the option `range` decides:

    running    m is a moving average of max|x| over batches (weight of the new one: `momentum`), kept in the state dict.
               Forward uses m as it was before the step; the batch's maximum, over all ranks, enters after the step.
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
        shape = (1,) if channels is None else (channels, 1)
        self.register_buffer("largest", torch.ones(shape))  # m
        self.register_buffer("seen", torch.zeros(shape), persistent=False)  # max|x| since the last step

    def table(self, elements: int | None = None) -> Table:
        return Table(gaps=(self.largest / self.level_range[1]).clamp(min=SMALLEST_STEP))

    def forward(self, x: Tensor) -> Tensor:
        self._require_calibrated()
        if self.range == "reference":
            step = x.detach().max() / self.level_range[1]
            y = torch.round(x.detach() / step) * step
            return x + (y - x).detach()
        if self.range == "dynamic":
            self.largest.copy_(self._largest_of(x))
        elif self.range == "running" and self.training:
            self.seen.copy_(torch.maximum(self.seen, self._largest_of(x)))
        # `table` copies the running range, which changes in place after the step: backward needs the forward's values.
        return fake_quantize(x, self.table(), self.rule())

    def encode(self, x: Tensor) -> Tensor:
        if self.range == "reference":
            raise ValueError("minmax: range = reference has no level indices: it does not clamp, it is for parity only")
        if self.range == "dynamic" and torch.isfinite(x).all():
            self.largest.copy_(self._largest_of(x))
        return super().encode(x)

    def _largest_of(self, x: Tensor) -> Tensor:
        x = x.detach().abs()
        return x.amax().to(self.largest).view(1) if self.channels is None else x.flatten(1).amax(1, keepdim=True)

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
