"""Initializer `mse`: the parameters of least squared error on the data's histogram.

It has two parts. Every quantizer gets the common step that is best for its own grid. Unlike NMSE's formula, this
assumes neither a normal tensor nor UniQ's grid, and the search starts at the largest value, so no wrong guess confines
it. A quantizer with free levels (nuLSQ) then runs Lloyd's iteration (Max 1960, Lloyd 1982): thresholds move halfway
between levels, levels move to the mean of the values between their thresholds, and zero stays a level.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nulsq.quant.calibration.histogram import Histogram
from nulsq.quant.calibration.initial_step import SMALLEST_STEP

if TYPE_CHECKING:
    from nulsq.quant.base import Quantizer

COARSE, COARSE_RATIO = 60, 1.12  # candidates for the common step, from the largest useful one down to 1/800 of it
FINE, FINE_RATIO = 6, 1.01  # candidates on either side of the best of these
ELEMENTS = 2**20  # of the levels that are examined together: bounds the memory
EMPTY = 1e-6  # values in a cell that count as none: rounding of the sums
ITERATIONS, LEAST_GAIN = 1000, 1e-6  # Lloyd's iteration ends where it lowers the error by less than this share


@torch.no_grad()
def error(histogram: Histogram, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Sum of (x - Q(x))^2 over the histogram minus the sum of x^2, a constant of the data: float64.

    levels [..., L] and thresholds [..., L-1], or [..., C, L] and [..., C, L-1]; the result lacks the last dimension.
    """
    return _error(levels, *histogram.cells(thresholds))


def _error(levels: Tensor, count: Tensor, total: Tensor) -> Tensor:
    """The same from count and sum of the values on each level."""
    levels = levels.to(total)
    return (levels.square() * count - 2 * levels * total).sum(-1)


@torch.no_grad()
def best_step(quantizer: "Quantizer", histogram: Histogram, largest: Tensor) -> Tensor:
    """The step of least error, [] or [C] float64, within 1 percent. Changes the quantizer's steps.

    largest: max |x|, [] or [C] float64.
    """
    def search(start: Tensor, factors: Tensor) -> Tensor:
        levels, thresholds = [], []
        for factor in factors:
            quantizer.set_steps_((start * factor).clamp(min=SMALLEST_STEP).float())  # of a tensor of zeros
            table = quantizer.table()
            levels.append(quantizer.levels_of(table))
            thresholds.append(quantizer.thresholds_of(table))
        # Together, since most of the time goes into starting operations on small tensors.
        together = max(1, ELEMENTS // levels[0].numel())
        errors = [error(histogram, torch.stack(levels[first:first + together]),
                        torch.stack(thresholds[first:first + together])) for first in range(0, len(levels), together)]
        return start * factors.to(start)[torch.cat(errors).argmin(0)]

    widest = 2 * largest / max(quantizer.level_range[1], 1)  # with a wider step every value would be next to zero
    coarse = search(widest, COARSE_RATIO ** -torch.arange(COARSE, dtype=torch.float64))
    return search(coarse, FINE_RATIO ** torch.arange(-FINE, FINE + 1, dtype=torch.float64))


@torch.no_grad()
def lloyd_max(histogram: Histogram, square: Tensor, levels: Tensor, zero: int) -> Tensor:
    """Levels of least squared error, [L] or [C, L] float64, from ascending `levels`; the level at index `zero` is 0.

    square: sum of x^2, [] or [C] float64. A level without values does not move.
    """
    levels = levels.to(histogram.total)  # float64, on the histogram's device
    before = None
    for _ in range(ITERATIONS):
        count, total = histogram.cells((levels[..., :-1] + levels[..., 1:]) / 2)
        now = square + _error(levels, count, total)
        if before is not None and (before - now <= LEAST_GAIN * now).all():
            break
        before = now
        # Counts are fractions where a threshold lies inside a bin.
        new = torch.where(count > EMPTY, total / count.clamp(min=EMPTY), levels)
        new[..., zero] = 0
        levels = new.cummax(-1).values  # a neighbour may have passed a level without values
    return levels
