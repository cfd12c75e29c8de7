"""Lloyd-Max initialization (Max 1960, Lloyd 1982): the parameters of least squared error on the data's histogram.

It has two parts. Every quantizer gets the common step that is best for its own grid. Unlike NMSE's formula, this
assumes neither a normal tensor nor UniQ's grid. A quantizer with free levels (nuLSQ) then runs Lloyd's iteration:
thresholds move halfway between levels, levels move to the mean of the values between their thresholds, and zero stays a
level.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nulsq.quant.calibration.histogram import Histogram

if TYPE_CHECKING:
    from nulsq.quant.base import Quantizer

ITERATIONS = 1000
COARSE, FINE = 60, 20  # candidates for the common step: 10 % apart from 1/20 to 15 times the first guess, then 1 %


@torch.no_grad()
def error(histogram: Histogram, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Sum of (x - Q(x))^2 over the histogram minus the sum of x^2, a constant of the data: [] or [C], float64."""
    count, total = histogram.cells(thresholds)
    levels = levels.to(total)
    return (levels.square() * count - 2 * levels * total).sum(-1)


@torch.no_grad()
def best_step(quantizer: "Quantizer", histogram: Histogram, guess: Tensor) -> Tensor:
    """The step of least error near `guess`, both [] or [C] float64, within 1 percent. Changes the quantizer's steps."""
    def search(start: Tensor, factors: Tensor) -> Tensor:
        errors = []
        for factor in factors:
            quantizer.set_steps_((start * factor).float())
            table = quantizer.table()
            levels, thresholds = quantizer.levels_of(table), quantizer.thresholds_of(table)
            errors.append(error(histogram, levels, thresholds))
        least = torch.stack(errors).argmin(0)
        return start * factors.to(start)[least]

    coarse = search(guess, 1.1 ** torch.arange(-COARSE // 2, COARSE // 2, dtype=torch.float64))
    return search(coarse, 1.01 ** torch.arange(-FINE // 2, FINE // 2 + 1, dtype=torch.float64))


@torch.no_grad()
def lloyd_max(histogram: Histogram, levels: Tensor, zero: int) -> Tensor:
    """Levels of least squared error, [L] or [C, L] float64, from ascending `levels`; the level at index `zero` is 0.

    A level without values does not move.
    """
    levels = levels.to(histogram.total)  # float64, on the histogram's device
    for _ in range(ITERATIONS):
        count, total = histogram.cells((levels[..., :-1] + levels[..., 1:]) / 2)
        new = torch.where(count > 0, total / count.clamp(min=1), levels)
        new[..., zero] = 0
        new = new.cummax(-1).values  # a neighbour may have passed a level without values
        moved = (new - levels).abs().max()
        levels = new
        if moved <= 1e-7 * levels.abs().max():
            break
    return levels
