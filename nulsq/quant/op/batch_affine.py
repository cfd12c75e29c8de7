"""A batch norm as an affine map of its input: what a quantizer behind it does on the way, without a pass of its own.

    batch norm   (x - mean) / sqrt(var + eps) * weight + bias
    Affine       (x - center) * scale + shift,  center = mean, scale = weight / sqrt(var + eps), shift = bias

The statistics of a batch depend on x, so in backward they add to its gradient a further affine map of x, which is one
pass over the gradient that the operation gave.
"""

import torch
from torch import Tensor

from nulsq.quant.op import cpu, sole
from nulsq.quant.op.oracle import Affine, along_channels


def batch_affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Affine, Tensor, Tensor]:
    """What a batch norm in training does to x [N, C, H, W], on the CPU.

    Returns x, to be mapped in its place (its gradient goes through the statistics, too), the map, and without gradient
    the mean and the variance (of the batch: divided by its count) of each channel [C].

    Raises ValueError, as torch does, where a channel has one element.
    """
    if x.numel() // x.shape[1] < 2:
        raise ValueError(f"a batch norm in training needs more than one element of each channel, x is {tuple(x.shape)}")
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._are_functorch_transforms_active():  # transforms see what plain torch does
        mean, var = torch.ops.nulsq.moments(x) if compiling else moments(x)
        return x, Affine(mean, weight * (var + eps).rsqrt(), bias), mean.detach(), var.detach()
    with torch.no_grad():
        mean, var = cpu.moments(x)
    x, center, scale = _BatchAffine.apply(x, weight, mean, var, eps)
    return x, Affine(center, scale, bias), mean, var


class _BatchAffine(torch.autograd.Function):
    """x, weight, mean, var, eps -> x, center, scale; backward knows that mean and var are those of x."""

    @staticmethod
    def forward(ctx, x, weight, mean, var, eps):
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        return x.view_as(x), mean.clone(), weight * inverse

    @staticmethod
    def backward(ctx, dx, dcenter, dscale):
        x, weight, mean, inverse = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        # d inverse / d x = -inverse^3 (x - mean) / count,  d mean / d x = 1 / count
        line = Affine(mean, dscale * weight * inverse**3 / -count, dcenter / count)
        over = not torch.is_grad_enabled() and sole.references(dx) == sole.references_alone()
        return cpu.add_affine(dx, x, line, over), dscale * inverse, None, None, None


# ---- for a compiler: the moments are an operator, whose gradient is a line of x. That of torch.var_mean goes over x
# ---- once more, for the mean.

_library = torch.library.Library("nulsq", "FRAGMENT")
_library.define("moments(Tensor x) -> (Tensor, Tensor)")
_library.impl("moments", cpu.moments, "CPU")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel of x, as Inductor computes them: on the way."""
    var, mean = torch.var_mean(x.to(_computed_in(x)), (0, *range(2, x.dim())), correction=0)
    return mean, var


@torch.library.register_fake("nulsq::moments", lib=_library)
def _moments_like(x):
    return tuple(x.new_empty(x.shape[1], dtype=_computed_in(x)) for _ in range(2))


def _computed_in(x):
    return torch.promote_types(x.dtype, torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ctx, dmean, dvar):
    x, mean = ctx.saved_tensors
    count = x.numel() // x.shape[1]
    slope, shift = dvar * (2 / count), dmean / count
    return ((x - along_channels(mean, x)) * along_channels(slope, x) + along_channels(shift, x)).to(x.dtype)


torch.library.register_autograd("nulsq::moments", _backward, setup_context=_keep, lib=_library)
