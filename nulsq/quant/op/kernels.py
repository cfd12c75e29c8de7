"""The compiled kernels by device type, and the order of their arguments and results.

    cpu/kernel.py    C++, compiled on the machine where it runs
    gpu/kernel.py    Triton

Each module has `available()`, `takes(rule)`, `quantize`, `gradients` and `moments`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nulsq.quant.op import reference
from nulsq.quant.op.cpu import kernel as cpu
from nulsq.quant.op.gpu import kernel as gpu
from nulsq.quant.op.reference import Affine, Rule, Table

KERNELS = {"cpu": cpu, "cuda": gpu}
TABLE_FIELDS, AFFINE_FIELDS = len(Table._fields), len(Affine._fields)


@torch.compiler.assume_constant_result  # a compiler evaluates it once
def available(device: str) -> bool:
    """Whether this device type ("cpu", "cuda") has a kernel and the compiler that it needs."""
    return device in KERNELS and KERNELS[device].available()


def takes_affine(x: Tensor, rule: Rule) -> bool:
    """Whether a kernel computes this rule of x after an affine map."""
    return x.device.type in KERNELS and KERNELS[x.device.type].takes(rule)


def table_and_affine(tensors: Sequence[Tensor | None]) -> tuple[Table, Affine | None]:
    """The table and the affine map (None if it is absent) from the tensors of both, in order."""
    table, affine = Table._make(tensors[:TABLE_FIELDS]), tensors[TABLE_FIELDS:]
    return table, Affine._make((*affine, None)[:AFFINE_FIELDS]) if affine and affine[0] is not None else None


def differentiable_gradients(x: Tensor, grad_output: Tensor, table: Table, rule: Rule,
                             affine: Affine | None) -> tuple[Tensor | None, ...]:
    """A kernel's gradients in plain PyTorch, for a backward pass with create_graph=True.

    A kernel's results have no gradient, so second derivatives would be zero or wrong. Raises RuntimeError after an
    affine map, for which there is no plain form.
    """
    if affine is not None:
        raise RuntimeError("this model is folded, and a folded batch norm has no second derivative: call "
                           "nulsq.unfold_(model) before a backward pass with create_graph=True")
    return reference.gradients(x, grad_output, table, rule)


def in_argument_order(gradients: Sequence[Tensor | None], affine: Affine | None) -> tuple[Tensor | None, ...]:
    """A kernel's gradients as those of x, of each field of the table and of each field of the affine map.

    None where there is no gradient; operators return an empty tensor for that.
    """
    grad_input, *sums = gradients
    grad_gaps, grad_offset, grad_slope = (t if t is not None and t.numel() else None for t in sums[:3])
    grad_table = grad_gaps, None, None, grad_offset, grad_slope
    if affine is None:
        return grad_input, *grad_table, *(None,) * AFFINE_FIELDS
    grad_scale_sum, grad_bias_sum = sums[3:]
    assert grad_bias_sum is not None
    grad_mean = -affine.scale * grad_bias_sum if affine.rstd is None else None
    return grad_input, *grad_table, grad_mean, grad_scale_sum, grad_bias_sum, None
