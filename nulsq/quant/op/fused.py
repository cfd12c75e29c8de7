"""The fused form: one pass over memory in each direction, by a compiled kernel (see `nulsq.quant.op.kernels`).

Plain tensors take the autograd function `Fused`. Compilers, export and fake tensors take the operators of
`nulsq.quant.op.inductor`, which call the same kernels through torch's dispatcher. The dispatcher costs more time than
the kernel itself on the weights of a small layer, so plain tensors avoid it.
"""

import contextlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from nulsq.quant.op.inductor import operator
from nulsq.quant.op.kernels import (
    AFFINE_FIELDS,
    KERNELS,
    TABLE_FIELDS,
    differentiable_gradients,
    in_argument_order,
    table_and_affine,
)
from nulsq.quant.op.reference import Affine, Rule, Table, without_unused_sums


def fused(x: Tensor, table: Table, rule: Rule, affine: Affine | None = None) -> Tensor:
    """x -> its level by `rule`, after the affine map if there is one; shape, type and memory order of x."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return operator(x, table, rule, affine)
    return Fused.apply(x, *table, rule, *(affine or (None,) * AFFINE_FIELDS))


class Fused(torch.autograd.Function):
    """As `Reference`, after an affine map if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gaps: Tensor, levels: Tensor | None, thresholds: Tensor | None,
                offset: Tensor | None, slope: Tensor | None, rule: Rule, *affine: Tensor | None) -> Tensor:
        tensors = gaps, levels, thresholds, offset, slope, *affine
        ctx.save_for_backward(x, *tensors)
        ctx.rule = rule
        return _quantize(x, tensors, rule)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        rule = without_unused_sums(ctx.rule, ctx.needs_input_grad[:TABLE_FIELDS + 1])
        table, affine = table_and_affine(tensors)
        gradients_of = differentiable_gradients if torch.is_grad_enabled() else KERNELS[x.device.type].gradients
        gradients = gradients_of(x, grad_output, table, rule, affine)
        grad_input, *rest = in_argument_order(gradients, affine)
        return grad_input, *rest[:TABLE_FIELDS], None, *rest[TABLE_FIELDS:]


def _quantize(x: Tensor, tensors: tuple[Tensor | None, ...] | list[Tensor], rule: Rule) -> Tensor:
    table, affine = table_and_affine(tensors)
    return KERNELS[x.device.type].quantize(x, table, rule, affine)


def requantized(y: Tensor) -> contextlib.AbstractContextManager:
    """Context for the operation that reads y, a fused quantizer's output: backward recomputes y instead of keeping it.

    A convolution keeps its input for backward, and so does the operation before the quantizer. With y recomputed, a
    network holds one tensor of that size instead of two. Does nothing if y is not the output of `Fused`, or if a
    compiler or activation checkpointing already decides what to keep.

    Uses private functions of torch: the public `saved_tensors_hooks` can install hooks but not say whether others are
    active, and a node's public type does not say which autograd function made it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return contextlib.nullcontext()
    node, hooks = y.grad_fn, cast(Any, torch._C._autograd)
    if (type(node) is not Fused._backward_cls or not hooks._saved_tensors_hooks_is_enabled()
            or hooks._top_saved_tensors_default_hooks(True) is not None):
        return contextlib.nullcontext()
    address, count = y.data_ptr(), y.numel()  # not y itself: the hooks live as long as the graph

    def pack(tensor: Tensor) -> Any:
        if tensor.data_ptr() == address and tensor.numel() == count:
            return node, tensor.shape, tensor.stride()
        return tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        node, shape, stride = packed
        x, *tensors = node.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: second derivatives need the history of y
            return Fused.apply(x, *tensors[:TABLE_FIELDS], node.rule, *tensors[TABLE_FIELDS:]).as_strided(shape, stride)
        with torch.no_grad():
            return _quantize(x, tensors, node.rule).as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
