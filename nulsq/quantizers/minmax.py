"""MinMax: a uniform grid over [-m, m] or [0, m] with m = max|x|, nothing learned. The 8-bit first and last layer.

    levels      k m / Qp, k = -Qp ... Qp signed, 0 ... Qp unsigned (so 2^b - 1 levels when signed)
    thresholds  (k + 1/2) m / Qp, round half to even
    dy/dx       1 inside, 0 outside

Weights take m from the weight itself in every forward. Activations have a range of their own (option `range`):

    running    m is an average of the batches' max|x| (`momentum` of the new one), kept in the state dict. Forward
               uses m as it was before the step; the batch's own maximum, over all ranks, enters it after the step.
    static     m as calibration found it
    dynamic    m of the batch at hand, also in evaluation: not deployable, two ranks differ from one
    reference  as `dynamic`, with max(x) for max|x| and no clamp: the authors' code, for parity only. There a
               weight of -3 beside a largest 1 has code -381 at 8 bits.
"""

import torch

from nulsq.quant.base import Quantizer
from nulsq.quant.calibration.initial_step import SMALLEST_STEP
from nulsq.quant.op import Table, fake_quantize

RANGES = ("running", "static", "dynamic", "reference")


class MinMax(Quantizer):
    """Uniform grid over the observed range."""

    index, ste, reduction = "uniform", "clip", "none"

    def __init__(self, bits, role, *, signed=None, channels=None, range="running", momentum=0.1, **options):
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        if range not in RANGES:
            raise ValueError(f"minmax: range = {range!r}, allowed: {', '.join(RANGES)}")
        self.momentum = momentum
        self.range = "dynamic" if role == "weight" and range != "reference" else range
        shape = (1,) if channels is None else (channels, 1)
        self.register_buffer("largest", torch.ones(shape))  # m
        self.register_buffer("seen", torch.zeros(shape), persistent=False)  # largest of the batches since last step

    @property
    def level_range(self):
        high = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        return (-high if self.signed else 0), high

    def table(self, elements=None):
        return Table(gaps=(self.largest / self.level_range[1]).clamp(min=SMALLEST_STEP))

    def forward(self, x):
        self._require_calibrated()
        if self.range == "reference":
            step = x.detach().max() / self.level_range[1]
            y = torch.round(x.detach() / step) * step
            return x + (y - x).detach()
        if self.range == "dynamic":
            self.largest.copy_(self._largest_of(x))
        elif self.range == "running" and self.training:
            self.seen.copy_(torch.maximum(self.seen, self._largest_of(x)))
        # The running range changes in place after the step; backward needs the table that forward used.
        return fake_quantize(x, self.table(), self.rule())

    def encode(self, x):
        if self.range == "reference":
            raise ValueError("minmax: range = reference has no codes of b bits (it does not clamp), it is for parity")
        if self.range == "dynamic" and torch.isfinite(x).all():
            self.largest.copy_(self._largest_of(x))
        return super().encode(x)

    def _largest_of(self, x):
        x = x.detach().abs()
        return x.amax().to(self.largest).view(1) if self.channels is None else x.flatten(1).amax(1, keepdim=True)

    @torch.no_grad()
    def reset_(self, statistics, init=None):
        super().reset_(statistics, init)
        self.largest.copy_(statistics.largest.to(self.largest).view(self.largest.shape))
        self.seen.zero_()

    def set_steps_(self, step):
        pass  # nothing learned: `reset_` sets the range

    @torch.no_grad()
    def after_step_(self):
        """Let the batch's maximum, already reduced over the ranks, into the running range."""
        if self.range == "running":
            new = torch.lerp(self.largest, self.seen, self.momentum)
            self.largest.copy_(torch.where(self.seen > 0, new, self.largest))
            self.seen.zero_()
