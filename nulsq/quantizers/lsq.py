"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv:1902.08153).

One learned step s. With Qn = 2^(b-1), Qp = 2^(b-1) - 1 (signed) or Qn = 0, Qp = 2^b - 1 (unsigned):

    levels      k s, k = -Qn ... Qp
    thresholds  (k + 1/2) s, round half to even
    forward     y = s round(clip(x / s, -Qn, Qp))                                        (paper, eq. 1 and 2)
    dy/ds       round(x/s) - x/s inside, -Qn below, Qp above                             (paper, eq. 3)
    dy/dx       1 inside, 0 outside                                                      (paper, eq. 5)
    gradient scale 1 / sqrt(N Qp), option `grad_scale`; implementations differ in N, see `Quantizer`

The reference implementation of nuLSQ passes half of the gradient at x = 0 and x = Qp s, because torch.min divides it
between equal values. `ste: half` reproduces that; the default `clip` passes all of it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.op import Table, scale_gradient


class LSQ(Quantizer):
    """One learned step per tensor or per output channel."""

    index, ste, reduction = "uniform", "clip", "total"

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 **options: Any) -> None:
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        self.step = nn.Parameter(torch.ones(1) if channels is None else torch.ones(channels, 1))

    def table(self, elements: int | None = None) -> Table:
        step: Tensor = self.step
        if elements is not None:
            step = scale_gradient(step, self.gradient_factor(elements, self.level_range[1]))
        return Table(gaps=step)

    def set_steps_(self, step: Tensor) -> None:
        self.step.copy_(step.view(self.step.shape))
