"""Initial step sizes from statistics: pure functions of (statistics, bits, sign), each from a paper.

All initial steps of a quantizer are equal, so each function returns one number per tensor or per channel:

    nmse   minimizes E[(x - Q(x))^2] of a normal (signed) or half-normal (unsigned) tensor
    lsq    2 E|x| / sqrt(Qp)                                       (Esser et al., LSQ, ICLR 2020)
    const  a fixed clipping range over Qp: 3 for weights, 8 for activations, as in the reference of nuLSQ

The initializer `mse` is no formula, see `nulsq.quant.calibration.least_squares`.

`Qp` is the number of the highest level: 2^bits - 1 unsigned, 2^(bits-1) - 1 signed (0 for one signed bit).
"""

import torch
from torch import Tensor

from nulsq.quant.calibration.statistics import Statistics

# Optimal step of a standard normal tensor on the mid-rise grid of 2^b levels, by Qp = 2^(b-1) - 1.
# The digits are those of the UniQ and nuLSQ authors: a difference of two units in the last place changes networks.
NORMAL_STEP = {
    0: 1.5957691216057308, 1: 0.9956866859435065, 3: 0.5860194414434872, 7: 0.33520061219993685,
    15: 0.18813879027991698, 31: 0.10406300944201481, 63: 0.05686767238235839, 127: 0.03076238758025524,
}
# Optimal step of a half-normal tensor with E[x^2] = 1/2 on {0, s, ..., Qp s}, by Qp = 2^b - 1.
HALF_NORMAL_STEP = {
    1: 1.22399153, 3: 0.65076985, 7: 0.35340955, 15: 0.19324868, 31: 0.10548752, 63: 0.0572659,
    127: 0.03087133, 255: 0.01652923,
}
CLIP_RANGE = {"weight": 3.0, "activation": 8.0}

SMALLEST_STEP = 1e-6  # so that a tensor of zeros gets a usable grid


def nmse(statistics: Statistics, qp: int, role: str, signed: bool) -> Tensor:
    if role == "weight":
        std, root_mean_square = statistics.std, statistics.mean_square.sqrt()
        # Weights far from zero on one side (a constant channel, one weight per channel) need a grid that reaches them.
        return torch.where(std < root_mean_square / 2, root_mean_square, std) * NORMAL_STEP[qp]
    if signed:  # activations need not have mean zero: their grid has a level at zero and must reach both tails
        return statistics.mean_square.sqrt() * NORMAL_STEP[qp]
    return (2 * statistics.mean_square).sqrt() * HALF_NORMAL_STEP[qp]


def lsq(statistics: Statistics, qp: int, role: str, signed: bool) -> Tensor:
    return 2 * statistics.mean_absolute / max(qp, 1) ** 0.5


def const(statistics: Statistics, qp: int, role: str, signed: bool) -> Tensor:
    return torch.full_like(statistics.count, CLIP_RANGE[role] / max(qp, 1))


BY_NAME = {"nmse": nmse, "lsq": lsq, "const": const}


def initial_step(name: str, statistics: Statistics, qp: int, role: str, signed: bool) -> Tensor:
    """The common initial step size, float64, [] or [C], at least SMALLEST_STEP."""
    return BY_NAME[name](statistics, qp, role, signed).clamp(min=SMALLEST_STEP)
