"""Tensors as the kernels take them: dense memory, table rows outermost, one computation type."""

import torch
from torch import Tensor

from nulsq.quant.op.reference import Rule, Table, compute_dtype


def dense(x: Tensor) -> Tensor:
    """x itself if its elements have no gaps in memory, contiguous or channels last; else a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def prepare_layout(x: Tensor, table: Table, narrow: tuple[torch.dtype, ...]) -> tuple[Tensor, Table, int]:
    """Dense x, a contiguous table, and the number of table rows.

    Both are in the computation type, except that x keeps a type of `narrow` where the computation is in float32: the
    kernel widens it while reading.
    """
    dtype = compute_dtype(x, table)
    x = dense(x)
    if x.dtype != dtype and not (dtype == torch.float32 and x.dtype in narrow):
        x = x.to(dtype)
    table = table.map(lambda t: t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous())
    return x, table, table.gaps.shape[0] if table.gaps.dim() == 2 else 1


def match_layout(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the type and memory order of x, which is dense. A copy only where they differ."""
    return grad if grad.dtype == x.dtype and grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def gradient_buffers(table: Table, rule: Rule) -> list[Tensor | None]:
    """Empty tensors for the gradients of gaps, offset and slope; None where the rule's reduction has none."""
    sizes = ((table.gaps, rule.reduction != "none"), (table.offset, rule.reduction == "per_cell"),
             (table.slope, rule.reduction == "per_cell"))
    return [torch.empty_like(tensor) if tensor is not None and needed else None for tensor, needed in sizes]
