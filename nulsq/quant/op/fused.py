"""The fused form: one pass over memory in each direction, by a kernel for each kind of device.

    cpu.py      C++, compiled where it runs
    gpu.py      Triton

To torch.compile, export, fake tensors and CUDA graphs the kernels are operators like any other,
`torch.ops.nulsq.quantize` and `torch.ops.nulsq.gradients` (`gradients_over`: in place): a node of the graph with a
shape, a gradient and an implementation for each device; their arguments after the table are the fields of `Rule` in
their order. Plain tensors outside a compiler take the autograd function `Fused` instead: the same kernels without the
dispatcher, whose bookkeeping costs more than the kernel does on the weights of a small layer.
"""

import contextlib
import functools

import torch
from torch import Tensor, nn

from nulsq.quant.op import cpu, gpu, oracle, sole
from nulsq.quant.op.layout import dense, gradient_buffers
from nulsq.quant.op.oracle import Oracle, Rule, Table, sums_asked_for

KERNELS = {"cpu": cpu, "cuda": gpu}
_TABLE = "Tensor gaps, Tensor low, Tensor high, Tensor? levels, Tensor? thresholds, Tensor? offset, Tensor? slope"
_RULE = "str index, str ste, str reduction, int[] codes, bool[] ties_up, float shift, int segments, bool relu"
_FIELDS = len(Table._fields)
MOST_INLINED = 15  # thresholds: the comparisons are unrolled


@torch.compiler.assume_constant_result  # a compiler asks once and takes the answer for good
def available(device: str) -> bool:
    """Whether there is a kernel for this kind of device ("cpu", "cuda"), and what compiles it."""
    return device in KERNELS and KERNELS[device].available()


def fused(x: Tensor, table: Table, rule: Rule) -> Tensor:
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return torch.ops.nulsq.quantize(x, *table, *rule)
    function = Transformed if torch._C._are_functorch_transforms_active() else Fused
    return function.apply(x, *table, rule)


def requantized(y: Tensor) -> contextlib.AbstractContextManager:
    """A context for the operation that takes y, a fused quantizer's output: what it keeps of y is made again from x.

    A convolution keeps its input for backward, and so does the activation function before the quantizer. With y made
    again in backward, a network holds one tensor of that size where it would hold two. Changes nothing where y did not
    come from `Fused`, and where somebody else decides what to keep: a compiler, or activation checkpointing.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    node, hooks = y.grad_fn, torch._C._autograd
    if (type(node) is not Fused._backward_cls or not hooks._saved_tensors_hooks_is_enabled()
            or hooks._top_saved_tensors_default_hooks(True) is not None):
        return contextlib.nullcontext()
    place, count = y.data_ptr(), y.numel()  # not y itself: the hooks live as long as the graph

    def pack(tensor):
        if tensor.data_ptr() == place and tensor.numel() == count:
            return node, tensor.shape, tensor.stride()
        return tensor

    def unpack(kept):
        if isinstance(kept, Tensor):
            return kept
        node, shape, stride = kept
        x, *table = node.saved_tensors
        with torch.no_grad():
            return KERNELS[x.device.type].quantize(x, Table(*table), node.rule).as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Fused(torch.autograd.Function):
    """x -> its level by `rule`; shape, type and memory order of x."""

    @staticmethod
    def forward(ctx, x, gaps, low, high, levels, thresholds, offset, slope, rule):
        table = Table(gaps, low, high, levels, thresholds, offset, slope)
        ctx.save_for_backward(x, *table)
        ctx.rule = rule
        return KERNELS[x.device.type].quantize(x, table, rule)

    @staticmethod
    def backward(ctx, dy):
        x, *table = ctx.saved_tensors
        rule = sums_asked_for(ctx.rule, ctx.needs_input_grad)
        if x.device.type == "cpu":  # over dy, where autograd keeps it for nobody else
            over = not torch.is_grad_enabled() and sole.references(dy) == sole.references_alone()
            return *_in_order(cpu.gradients(x, dy, Table(*table), rule, over)), None
        return *_in_order(KERNELS[x.device.type].gradients(x, dy, Table(*table), rule)), None


class Transformed(Oracle):
    """The same in the shape that torch.func asks for, which takes longer to call; keeps what the oracle keeps."""

    @staticmethod
    def forward(x, gaps, low, high, levels, thresholds, offset, slope, rule):
        return torch.ops.nulsq.quantize(x, gaps, low, high, levels, thresholds, offset, slope, *rule)

    @staticmethod
    def backward(ctx, dy):
        x, *table = ctx.saved_tensors
        rule = sums_asked_for(ctx.rule, ctx.needs_input_grad)
        return *_in_order(torch.ops.nulsq.gradients(x, dy, *table, *rule)), None

    @staticmethod
    def vmap(info, dims, x, *rest):
        return _quantize_batch(info, dims, x, *rest[:_FIELDS], *rest[_FIELDS])


def _in_order(found):
    """dx and the table's gradients, None where there is none, for the arguments x and table."""
    dx, *sums = found
    dgaps, dlow, dhigh, doffset, dslope = (each if each.numel() else None for each in sums)
    return dx, dgaps, dlow, dhigh, None, None, doffset, dslope


# ---- operators of torch

_library = torch.library.Library("nulsq", "DEF")
_library.define(f"quantize(Tensor x, {_TABLE}, {_RULE}) -> Tensor")
_library.define(f"gradients(Tensor x, Tensor dy, {_TABLE}, {_RULE}) -> "
                "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
# The same with dx in the place of dy, for a compiler that knows whose dy is; on the CPU only, where it pays.
_library.define(f"gradients_over(Tensor x, Tensor(a!) dy, {_TABLE}, {_RULE}) -> "
                "(Tensor, Tensor, Tensor, Tensor, Tensor)")


def _read(arguments):
    rule = Rule(*arguments[_FIELDS:])
    return Table(*arguments[:_FIELDS]), rule._replace(codes=tuple(rule.codes), ties_up=tuple(rule.ties_up))


for _device, _kernel in KERNELS.items():
    _library.impl("quantize", lambda x, *rest, kernel=_kernel: kernel.quantize(x, *_read(rest)), _device.upper())
    _library.impl("gradients", lambda x, dy, *rest, kernel=_kernel: kernel.gradients(x, dy, *_read(rest)),
                  _device.upper())


def _gradients_over(x, dy, *rest):
    dx, *sums = cpu.gradients(x, dy, *_read(rest), over=True)
    if dx is not dy:  # another order of memory, or another type
        dy.copy_(dx)
    return tuple(sums)


_library.impl("gradients_over", _gradients_over, "CPU")


@torch.library.register_fake("nulsq::quantize", lib=_library)
def _quantize_like(x, *rest):
    return torch.empty_like(dense(x))


@torch.library.register_fake("nulsq::gradients", lib=_library)
def _gradients_like(x, dy, *rest):
    return torch.empty_like(dense(x)), *gradient_buffers(*_read(rest))


@torch.library.register_fake("nulsq::gradients_over", lib=_library)
def _sums_like(x, dy, *rest):
    return tuple(gradient_buffers(*_read(rest)))


def _keep(ctx, inputs, output):
    x, *rest = inputs
    ctx.save_for_backward(x, *rest[:_FIELDS])
    ctx.rule = rest[_FIELDS:]


def _backward(ctx, dy):
    x, *table = ctx.saved_tensors
    rule = sums_asked_for(Rule(*ctx.rule), ctx.needs_input_grad)
    return *_in_order(torch.ops.nulsq.gradients(x, dy, *table, *rule)), *(None,) * len(Rule._fields)


torch.library.register_autograd("nulsq::quantize", _backward, setup_context=_keep, lib=_library)


@functools.cache
def inline_forward() -> None:
    """From now on Inductor takes the oracle's comparisons for forward: part of the batch norm before them, they need no
    pass over memory of their own. Backward stays the kernel: Inductor's sums over a whole tensor are passes of theirs.
    """
    from torch._inductor.decomposition import fast_random_decomps, register_decomposition

    @register_decomposition([torch.ops.nulsq.quantize.default])
    def quantize(x, *rest):
        table, rule = _read(rest)
        if len(rule.ties_up) > MOST_INLINED:
            return NotImplemented
        return oracle.quantize(x, table, rule)[0].to(x.dtype)

    fast_random_decomps.cache_clear()  # Inductor's copy of its table, if anything was compiled before


# ---- torch.vmap, for the gradients of each sample: a batch of calls is one call with a table for each "channel"


def _quantize_batch(info, dims, x, *rest):
    (x,), table, unfold, _ = _fold(info.batch_size, dims, (x,), rest)
    return unfold(torch.ops.nulsq.quantize(x, *table, *rest[_FIELDS:])), 0


def _gradients_batch(info, dims, x, dy, *rest):
    (x, dy), table, unfold, unfold_sums = _fold(info.batch_size, dims, (x, dy), rest)
    dx, *sums = torch.ops.nulsq.gradients(x, dy, *table, *rest[_FIELDS:])
    return (unfold(dx), *map(unfold_sums, sums)), (0, *(0 if each.numel() else None for each in sums))


torch.library.register_vmap("nulsq::quantize", _quantize_batch, lib=_library)
torch.library.register_vmap("nulsq::gradients", _gradients_batch, lib=_library)


def _fold(size, dims, tensors, rest):
    """Tensors as [size * channels, ...] and the table with a row for each; and the way back for both."""
    def whole(t, dim):
        return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)

    count = len(tensors)
    tensors = [whole(*each) for each in zip(tensors, dims, strict=False)]
    table = [t if t is None else whole(t, dim) for t, dim in zip(rest[:_FIELDS], dims[count:], strict=False)]
    channels = table[0].shape[1:-1]  # () or (C,)
    rows, shape = size * channels.numel(), tensors[0].shape
    return ([t.reshape(rows, -1) for t in tensors], [t if t is None else t.reshape(rows, -1) for t in table],
            lambda y: y.view(shape), lambda s: s.view(size, *channels, -1) if s.numel() else s)
