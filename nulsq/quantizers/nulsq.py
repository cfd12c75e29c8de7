"""nuLSQ: non-uniform learned step sizes (Gongyo et al., ACCV 2024). Every interval has a step of its own.

Unsigned ("Positive nuLSQ", for activations after a ReLU): steps s_1 ... s_K, K = 2^b - 1, and

    levels      c_0 = 0, c_j = s_1 + ... + s_j
    thresholds  c_j - s_j / 2; x at a threshold goes to the level nearer zero
    dy/ds_j     round(u) - u inside interval j, u = (x - c_{j-1}) / s_j;  1 for every j where x > c_K
    dy/dx       1 for 0 <= x <= c_K, else 0

Signed ("Symmetric nuLSQ", for weights; here also for activations with negative values): Qn = 2^(b-1) steps on the
negative side and Qp = 2^(b-1) - 1 on the positive side, all independent; zero is a level; each side as above. Both
forms have 2^b - 1 steps, stored as [negative side from zero outward, positive side from zero outward].

With equal steps this is LSQ, except at ties, and the gradients of the steps add up to LSQ's.

Gradient scale (option `grad_scale`; the published CIFAR recipe uses none): 1 / sqrt(N K) unsigned,
2 / sqrt(N Qn) and 2 / sqrt(N Qp) for the two sides signed.

Differences from the authors' code: it asserts in a loop that each step is positive (each assertion synchronizes, and
one negative step ends the run), turns NaN into the top level, and compares with `scale.sum()` while its levels come
from a running sum. Here steps are projected after the optimizer's step, NaN stays NaN, and all results use one table.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nulsq.quant.base import SMALLEST_STEP, Quantizer
from nulsq.quant.op import Table, scale_gradient


class NuLSQ(Quantizer):
    """2^bits - 1 learned steps per tensor or per output channel."""

    index, ste, reduction = "table", "clip", "per_gap"
    free_levels = True

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 **options: Any) -> None:
        super().__init__(bits, role, signed=signed, channels=channels, **options)
        intervals = 2**bits - 1
        self.steps = nn.Parameter(torch.ones(intervals) if channels is None else torch.ones(channels, intervals))

    def table(self, elements: int | None = None) -> Table:
        below = -self.level_range[0]  # number of negative steps
        if not below:
            return self._positive(elements)
        negative, positive = self.steps[..., :below], self.steps[..., below:]
        if elements is not None:
            negative = scale_gradient(negative, self.gradient_factor(elements, below, 2.0))
            positive = scale_gradient(positive, self.gradient_factor(elements, positive.shape[-1], 2.0))
        with torch.no_grad():
            # Levels and thresholds are summed only here: a kernel that sums the steps again may end an ulp away.
            down, up = negative.cumsum(-1), positive.cumsum(-1)
            zero = torch.zeros_like(self.steps[..., :1])
            levels = torch.cat([-down.flip(-1), zero, up], -1)
            halfway = torch.sub(down, negative, alpha=0.5), torch.sub(up, positive, alpha=0.5)
            thresholds = torch.cat([-halfway[0].flip(-1), halfway[1]], -1)
        return Table(gaps=torch.cat([negative.flip(-1), positive], -1), levels=levels, thresholds=thresholds)

    def _positive(self, elements: int | None) -> Table:
        """The table of the unsigned form, in a third of the operations that an empty negative side would take."""
        steps: Tensor = self.steps
        if elements is not None:
            steps = scale_gradient(steps, self.gradient_factor(elements, steps.shape[-1]))
        fixed = steps.detach()
        up = fixed.cumsum(-1)
        return Table(gaps=steps, levels=nn.functional.pad(up, (1, 0)), thresholds=torch.sub(up, fixed, alpha=0.5))

    def ties_up(self) -> tuple[bool, ...]:
        low, high = self.level_range
        return (True,) * -low + (False,) * high

    def set_steps_(self, step: Tensor) -> None:
        self.steps.copy_(step.unsqueeze(-1).expand(self.steps.shape))

    def set_levels_(self, levels: Tensor) -> None:
        below = -self.level_range[0]
        gaps = levels.diff(dim=-1).clamp(min=SMALLEST_STEP)
        self.steps.copy_(torch.cat([gaps[..., :below].flip(-1), gaps[..., below:]], -1))
