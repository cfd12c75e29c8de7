"""How the kernels want their arguments: memory without gaps, channels outermost, one type to compute in."""

import torch
from torch import Tensor

from nulsq.quant.op.reference import Rule, Table, computed_in


def dense(x: Tensor) -> Tensor:
    """x itself where its elements lie without gaps, in order or channels last; else a copy in order."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def laid_out(x: Tensor, table: Table, narrow: tuple[torch.dtype, ...]) -> tuple[Tensor, Table, int]:
    """x dense, the table row by row, and how many rows: channels. Both in the type that is computed in, except that x
    stays in one of the types `narrow` where that is float32: the kernel widens those as it reads.
    """
    kind = computed_in(x, table)
    x = dense(x)
    if x.dtype != kind and not (kind == torch.float32 and x.dtype in narrow):
        x = x.to(kind)
    table = Table(*(t if t is None or t.dtype == kind and t.is_contiguous() else t.to(kind).contiguous()
                    for t in table))
    return x, table, table.gaps.shape[0] if table.gaps.dim() == 2 else 1


def laid_like(dy: Tensor, x: Tensor) -> Tensor:
    """dy in the type and the order of memory of x, which is dense."""
    return dy if dy.dtype == x.dtype and dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


def gradient_buffers(table: Table, rule: Rule) -> list[Tensor | None]:
    """Room for the gradients of gaps, offset and slope; None where the rule's reduction has none."""
    wanted = rule.reduction != "none", rule.reduction == "per_cell", rule.reduction == "per_cell"
    return [torch.empty_like(each) if asked else None
            for each, asked in zip((table.gaps, table.offset, table.slope), wanted, strict=True)]
