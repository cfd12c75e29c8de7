"""A batch norm in training as an affine map of its input, which the quantizer after it applies in its own pass.

    batch norm   (x - mean) / sqrt(var + eps) * weight + bias
    Affine       (x - mean) * scale + bias,  scale = weight * rstd,  rstd = 1 / sqrt(var + eps)

The statistics of a batch depend on x. `Affine.rstd` tells the operation to add the gradient that goes through them.
"""

import torch
from torch import Tensor

from nulsq.quant.op.kernels import KERNELS
from nulsq.quant.op.reference import Affine, compute_dtype, under_transform


def batch_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Affine, Tensor, Tensor]:
    """The map of a batch norm in training for x [N, C, H, W], and the batch's mean and variance [C], without gradient.

    The variance is divided by the count. Raises ValueError, as torch does, if a channel has only one element.
    """
    if x.numel() // x.shape[1] < 2:
        raise ValueError(f"a batch norm in training needs more than one element of each channel, x is {tuple(x.shape)}")
    if under_transform():  # plain operations, which transforms differentiate to any order
        var, mean = torch.var_mean(x.to(compute_dtype(x)), (0, *range(2, x.dim())), correction=0)
        return Affine(mean, weight * (var + eps).rsqrt(), bias), mean.detach(), var.detach()
    moments = torch.ops.nulsq.moments if torch.compiler.is_compiling() else KERNELS[x.device.type].moments
    mean, var = moments(x.detach())
    rstd = (var + eps).rsqrt()
    return Affine(mean, weight * rstd, bias, rstd), mean, var
