"""UniQ: the learnable symmetric quantizer with data-driven initial steps (Pham, Abraham and Chung, "Training
Multi-bit Quantized and Binarized Networks with A Learnable Symmetric Quantizer", IEEE Access 2021, arXiv:2104.00210).

One learned step s. Signed grids are mid-rise: zero is a threshold, not a level, so all 2^b levels are used at any b
and one bit is a sign:

    signed      levels (k + 1/2) s, k = -2^(b-1) ... 2^(b-1) - 1      thresholds k s, round half to even
    unsigned    levels k s, k = 0 ... 2^b - 1                         thresholds (k + 1/2) s, round half to even
    dy/ds       (y - x) / s inside, the end level / s outside
    dy/dx       1 inside, 0 outside
    gradient scale 1 / sqrt(N max(Q, 1)) with Q = 2^(b-1) - 1 signed and 2^b - 1 unsigned; N counts the elements of the
    whole batch for activations: `grad_scale: batch` is theirs
    initial step   `init: nmse`, whose constants are this paper's

The authors write the signed form as s round(clip((x + a) / s, 0, 2^b - 1)) - a with a = s (2^b - 1) / 2: the same
levels and thresholds. At one bit they put x = 0 on the lower level, we put it on the upper one. They train the step
with the weights' own optimizer and no decay (`optim.qparm_optimizer: sgd`, `coeff_qparm_lr: 1`, `qparm_wd: 0`), and at
one bit keep the first, last and shortcut layers float.

A signed activation that is exactly zero becomes s / 2: take another method where zeros carry meaning.
"""

import torch
from torch import nn

from nulsq.quant.base import Quantizer
from nulsq.quant.op import Table, scale_gradient


class UniQ(Quantizer):
    """One learned step per tensor or per output channel; mid-rise where signed. 1 to 8 bits."""

    index, ste, reduction = "uniform", "clip", "total"
    smallest_bits = 1

    def __init__(self, bits, role, *, signed=None, channels=None, **options):
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        self.step = nn.Parameter(torch.ones(1) if channels is None else torch.ones(channels, 1))

    @property
    def shift(self):
        return 0.5 if self.signed else 0.0

    def table(self, elements=None):
        step = self.step
        if elements is not None:
            step = scale_gradient(step, self.gradient_factor(elements, self.level_range[1]))
        return Table(gaps=step)

    def set_steps_(self, step):
        self.step.copy_(step.view(self.step.shape))
