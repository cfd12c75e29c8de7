"""A batch norm as an affine map of its input: what a quantizer behind it does on the way, without a pass of its own.

    batch norm   (x - mean) / sqrt(var + eps) * weight + bias
    Affine       (x - center) * scale + shift,  center = mean, scale = weight / sqrt(var + eps), shift = bias

The statistics of a batch depend on x: `Affine.inverse` tells the operation so, which adds to the gradient of x what
goes through them.
"""

import torch
from torch import Tensor

from nulsq.quant.op.fused import KERNELS
from nulsq.quant.op.reference import Affine, computed_in, under_transform


def batch_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Affine, Tensor, Tensor]:
    """What a batch norm in training does to x [N, C, H, W]: the map, and without gradient the mean and the variance (of
    the batch: divided by its count) of each channel [C].

    Raises ValueError, as torch does, where a channel has one element.
    """
    if x.numel() // x.shape[1] < 2:
        raise ValueError(f"a batch norm in training needs more than one element of each channel, x is {tuple(x.shape)}")
    if under_transform():  # which see what plain torch does, to any order
        var, mean = torch.var_mean(x.to(computed_in(x)), (0, *range(2, x.dim())), correction=0)
        return Affine(mean, weight * (var + eps).rsqrt(), bias), mean.detach(), var.detach()
    moments = torch.ops.nulsq.moments if torch.compiler.is_compiling() else KERNELS[x.device.type].moments
    mean, var = moments(x.detach())
    inverse = (var + eps).rsqrt()
    return Affine(mean, weight * inverse, bias, inverse), mean, var


_library = torch.library.Library("nulsq", "FRAGMENT")
_library.define("moments(Tensor x) -> (Tensor, Tensor)")
for _device, _kernels in KERNELS.items():
    _library.impl("moments", _kernels.moments, _device.upper())


@torch.library.register_fake("nulsq::moments", lib=_library)
def _moments_like(x):
    return tuple(x.new_empty(x.shape[1], dtype=computed_in(x)) for _ in range(2))
