"""APoT: additive powers of two (Li, Dong and Wang, ICLR 2020, arXiv:1909.13144). Levels are dense near zero.

One learned clipping threshold a. The B magnitude bits choose one term, or 0, from each of these sets. The level is a
times the sum of the terms over the largest sum (paper, eq. 5 with base 2; odd B as in the authors' code):

    B  terms other than 0                       levels / a
    1  {1}                                      {0, 1}
    2  {4, 2, 1}                                {0, 1, 2, 4} / 4
    3  {8, 4, 1} + {2}                          {0, 1, 2, 3, 4, 6, 8, 10} / 10
    4  {32, 8, 2} + {16, 4, 1}                  {0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48} / 48
    5  {64, 16, 2} + {32, 8, 1} + {4}           32 levels / 100
    6  {256, 32, 4} + {128, 16, 2} + {64, 8, 1} 64 levels / 448

    unsigned    B = b: 2^b levels
    signed      a sign and B = b - 1: 2^b - 1 levels, THREE at 2 bits, where LSQ, nuLSQ and UniQ have four
    thresholds  halfway between neighbouring levels; x at a threshold goes to the level nearer zero
    dy/da       (y - x) / a inside, +-1 outside ("reformulated clipping function": the rounding error counts)
    dy/dx       1 inside, 0 outside; for 2-bit weights 1 everywhere, as in the authors' code
    gradient scale sqrt(Q / N) with Q = 2^(b-1) - 1 signed, 2^b - 1 unsigned: LSQ's scale for a = Q s

Weights are normalized first, (w - mean) / deviation. The paper stops there (`normalization: wn`), since in its networks
a batch norm after every convolution undoes any scale. Here the quantized weight is multiplied by the deviation again by
default (`lwn`). Before a batch norm that is the same network with the same gradients. Where no batch norm follows
directly, as in pre-activation networks and transformers, it keeps the function of the float network that training
starts from. Published initialization: `init: const` (a = 3 for weights, 8 for activations on CIFAR, 6 on ImageNet),
first from the float network, then from 5, 4, 3 bits in turn (`model.init_from` a run).

Differences from the authors' code: there, levels are an unsorted set of floats outside the state dict, the nearest one
is found in a matrix of elements x levels, and the order of the set decides ties; the CIFAR code detaches mean and
deviation. B without a set of terms gives NaN there and an error here.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.op import Table, scale_gradient

TERMS: dict[int, list[tuple[int, ...]]] = {
    1: [(1,)], 2: [(4, 2, 1)], 3: [(8, 4, 1), (2,)], 4: [(32, 8, 2), (16, 4, 1)],
    5: [(64, 16, 2), (32, 8, 1), (4,)], 6: [(256, 32, 4), (128, 16, 2), (64, 8, 1)],
}


def magnitudes(bits: int) -> list[int]:
    """The 2^bits sums of terms, ascending; the last one corresponds to the clipping threshold."""
    return sorted(sum(chosen) for chosen in itertools.product(*((0, *terms) for terms in TERMS[bits])))


class APoT(Quantizer):
    """One learned clipping threshold per tensor or per output channel. 2 to 6 bits."""

    index, reduction = "table", "total"
    symmetric = True
    normalization = "lwn"
    smallest_bits, largest_bits = 2, 6
    unsigned_units: Tensor
    signed_units: Tensor

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 ste: str | None = None, **options: Any) -> None:
        if ste is None and role == "weight" and bits == 2:
            ste = "none"
        super().__init__(bits, role, signed=signed, channels=channels, ste=ste, **options)
        self.alpha = nn.Parameter(torch.ones(1) if channels is None else torch.ones(channels, 1))
        self.register_computed_buffers()

    def computed_buffers(self) -> dict[str, Tensor]:
        positive = magnitudes(self.bits - 1) if self.bits > 1 else [0]
        signed_units = [-unit for unit in positive[:0:-1]] + positive
        return {"unsigned_units": torch.tensor(magnitudes(self.bits), dtype=torch.float32),
                "signed_units": torch.tensor(signed_units, dtype=torch.float32)}

    def table(self, elements: int | None = None) -> Table:
        units = self.signed_units if self.signed else self.unsigned_units
        alpha: Tensor = self.alpha
        if elements is not None:
            alpha = scale_gradient(alpha, self.gradient_factor(elements, self.level_range[1]))
        with torch.no_grad():
            levels = alpha * (units / units[-1])
            thresholds = (levels[..., :-1] + levels[..., 1:]) / 2
        return Table(gaps=alpha, levels=levels, thresholds=thresholds)

    def ties_up(self) -> tuple[bool, ...]:
        low, high = self.level_range
        return (True,) * -low + (False,) * high

    def gradient_factor(self, elements: int | None, levels: int, numerator: float = 1.0) -> float:
        return 1.0 if not elements else (levels / elements) ** 0.5

    def set_steps_(self, step: Tensor) -> None:
        self.alpha.copy_((step * self.level_range[1]).view(self.alpha.shape))
