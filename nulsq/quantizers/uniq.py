"""UniQ: the learnable symmetric quantizer with data-driven initial steps (Pham, Abraham and Chung, "Training
Multi-bit Quantized and Binarized Networks with A Learnable Symmetric Quantizer", IEEE Access 2021, arXiv:2104.00210).

One learned step s. Signed grids are mid-rise: zero is a threshold, not a level, so all 2^b levels are used at any b
and one bit is a sign:

    signed      levels (k + 1/2) s, k = -2^(b-1) ... 2^(b-1) - 1      thresholds k s, round half to even
    unsigned    levels k s, k = 0 ... 2^b - 1                         thresholds (k + 1/2) s, round half to even
    dy/ds       (y - x) / s inside, the end level / s outside
    dy/dx       1 inside, 0 outside
    gradient scale 1 / sqrt(N max(Q, 1)) with Q = 2^(b-1) - 1 signed and 2^b - 1 unsigned; for activations N is the
    number of elements of the whole batch (`grad_scale: batch`)
    initial step   `init: nmse`, whose constants come from this paper

The authors write the signed form as s round(clip((x + a) / s, 0, 2^b - 1)) - a with a = s (2^b - 1) / 2, which has the
same levels and thresholds. At one bit they map x = 0 to the lower level, this file maps it to the upper one. They train
the step with the optimizer of the weights and without decay (`optim.qparm_optimizer: sgd`, `coeff_qparm_lr: 1`,
`qparm_wd: 0`). At one bit they keep the first, last and shortcut layers float.

A signed activation of exactly zero becomes s / 2. Use another method where zeros carry meaning.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.op import Table, scale_gradient


class UniQ(Quantizer):
    """One learned step per tensor or per output channel; mid-rise where signed. 1 to 8 bits."""

    index, ste, reduction = "uniform", "clip", "total"
    smallest_bits = 1

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 **options: Any) -> None:
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        self.step = nn.Parameter(torch.ones(1) if channels is None else torch.ones(channels, 1))

    @property
    def shift(self) -> float:  # type: ignore[override]  # the sign may come from data later
        return 0.5 if self.signed else 0.0

    def table(self, elements: int | None = None) -> Table:
        step: Tensor = self.step
        if elements is not None:
            step = scale_gradient(step, self.gradient_factor(elements, self.level_range[1]))
        return Table(gaps=step)

    def set_steps_(self, step: Tensor) -> None:
        self.step.copy_(step.view(self.step.shape))
