"""Whether a gradient that a backward function is given is that function's alone: then it may be written over.

Autograd hands the same tensor to everybody who has part in a sum, keeps what `torch.autograd.grad` was asked for, and
shows it to hooks, which may keep it. Whoever keeps a tensor holds a reference to it, to its storage or to the Python
object of either. How many there are when nobody does is not documented: it is counted once, in a graph where that is
so, and means nothing where a graph with another owner has the same numbers. Memory that torch does not own has no such
numbers: a backward function that gives out its own buffer as a NumPy array's tensor must not count on it afterwards.

    over = not torch.is_grad_enabled() and sole.references(dy) == sole.references_alone()     # in `backward` itself
"""

import functools
import sys

import torch
from torch import Tensor


def references(tensor: Tensor) -> tuple[int, ...]:
    """References to a tensor, its storage and the Python objects of both; () where this torch does not tell."""
    storage = tensor.untyped_storage()
    try:
        return (tensor._use_count(), torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(tensor),
                sys.getrefcount(storage))
    except AttributeError:
        return ()


@functools.cache
def references_alone() -> tuple[int, ...] | None:
    """What `references` says in `backward` of a gradient that nobody else has; None where it says the same of one that
    somebody has."""
    kept = []
    alone = _seen()
    others = [_seen(beside=True), _seen(kept.append)]
    others += [_seen(lambda gradient: kept.append(gradient.detach())),
               _seen(lambda gradient: kept.append(gradient.untyped_storage()))]
    return None if alone in others else alone


def _seen(hook=None, beside: bool = False) -> tuple[int, ...]:
    """What is said of the first gradient in a small graph, where a hook gets it too, or an addend beside."""
    counts, leaf = [], torch.zeros(2, requires_grad=True)
    with torch.enable_grad():
        y = _Counted.apply(leaf, counts)
        if hook:
            y.register_hook(hook)
        ((y + _Counted.apply(leaf, counts) if beside else y) * 2).sum().backward()
    return counts[0]


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        ctx.counts.append(references(dy))
        return dy * 2, None
