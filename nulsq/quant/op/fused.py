"""The fused form: one pass over memory in each direction, by a kernel for each kind of device.

    cpu.py      C++, compiled where it runs
    gpu.py      Triton

To torch.compile, export, fake tensors and CUDA graphs the kernels are operators like any other,
`torch.ops.nulsq.quantize` and `torch.ops.nulsq.gradients` (behind a batch norm `gradients_behind`): a
node of the graph with a shape, a gradient and an implementation for each device; their arguments after the table are
the fields of `Rule` in their order, then those of `Affine`. Plain tensors outside a compiler take the autograd function
`Fused` instead: the same kernels without the dispatcher, whose bookkeeping costs more than the kernel does on the
weights of a small layer.
"""

import contextlib
import functools

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nulsq.quant.op import reference as oracle
from nulsq.quant.op.cpu import kernel as cpu
from nulsq.quant.op.gpu import kernel as gpu
from nulsq.quant.op.layout import dense, gradient_buffers
from nulsq.quant.op.reference import Affine, Rule, Table, sums_asked_for

KERNELS = {"cpu": cpu, "cuda": gpu}
_TABLE = "Tensor gaps, Tensor? levels, Tensor? thresholds, Tensor? offset, Tensor? slope"
_RULE = "str index, str ste, str reduction, int[] level_range, bool[] ties_up, float shift, int segments, bool relu"
_AFFINE = "Tensor? center=None, Tensor? scale=None, Tensor? shift_by=None, Tensor? inverse=None"
_FIELDS, _SWITCHES, _LINES = len(Table._fields), len(Rule._fields), len(Affine._fields)
MOST_INLINED = 15  # thresholds: the comparisons are unrolled
SMALL, FEW = 2**17, 3  # elements and thresholds (each has a sum) of which a compiler's own backward is quicker


@torch.compiler.assume_constant_result  # a compiler asks once and takes the answer for good
def available(device: str) -> bool:
    """Whether there is a kernel for this kind of device ("cpu", "cuda"), and what compiles it."""
    return device in KERNELS and KERNELS[device].available()


def takes_affine(x: Tensor, rule: Rule) -> bool:
    """Whether `fused` has a kernel for x behind an affine map."""
    return x.device.type in KERNELS and KERNELS[x.device.type].takes(rule)


def fused(x: Tensor, table: Table, rule: Rule, affine: Affine | None = None) -> Tensor:
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        if affine is None and len(rule.ties_up) <= MOST_INLINED:
            return torch.ops.nulsq.quantize_inline(x, *table, *rule)
        return torch.ops.nulsq.quantize(x, *table, *rule, *(affine or ()))
    return Fused.apply(x, *table, rule, *(affine or (None,) * _LINES))


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
        x, *tensors = node.saved_tensors
        with torch.no_grad():
            return _quantize(x, *_table_and_affine(tensors, node.rule)).as_strided(shape, stride)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Fused(torch.autograd.Function):
    """x -> its level by `rule`, behind an affine map if there is one; shape, type and memory order of x."""

    @staticmethod
    def forward(ctx, x, gaps, levels, thresholds, offset, slope, rule, *affine):
        tensors = gaps, levels, thresholds, offset, slope, *affine
        ctx.save_for_backward(x, *tensors)
        ctx.rule = rule
        return _quantize(x, *_table_and_affine(tensors, rule))

    @staticmethod
    def backward(ctx, dy):
        x, *tensors = ctx.saved_tensors
        rule = sums_asked_for(ctx.rule, ctx.needs_input_grad[:_FIELDS + 1])
        table, rule, affine = _table_and_affine(tensors, rule)
        dx, *rest = _in_order(KERNELS[x.device.type].gradients(x, dy, table, rule, affine), affine)
        return dx, *rest[:_FIELDS], None, *rest[_FIELDS:]


def _table_and_affine(tensors, rule):
    """Table, rule and affine map, None where there is none, from the tensors of both in their order."""
    return Table(*tensors[:_FIELDS]), rule, None if tensors[_FIELDS] is None else Affine(*tensors[_FIELDS:])


def _quantize(x, table, rule, affine):
    return KERNELS[x.device.type].quantize(x, table, rule, affine)


def _in_order(found, affine=None):
    """Gradients of x, the table and the affine map, None where there is none, as their arguments stand."""
    dx, *sums = found
    dgaps, doffset, dslope = (each if each is not None and each.numel() else None for each in sums[:3])
    if affine is None:
        return dx, dgaps, None, None, doffset, dslope, *(None,) * _LINES
    dscale, dshift = sums[3:]
    dcenter = -affine.scale * dshift if affine.inverse is None else None
    return dx, dgaps, None, None, doffset, dslope, dcenter, dscale, dshift, None


# ---- operators of torch

_library = torch.library.Library("nulsq", "DEF")
_SUMS = ", ".join(["Tensor"] * 3)
for _suffix in ("", "_inline"):  # _inline: the same, of which Inductor may make comparisons, see `inline_forward`
    _library.define(f"quantize{_suffix}(Tensor x, {_TABLE}, {_RULE}, {_AFFINE}) -> Tensor")
    _library.define(f"gradients{_suffix}(Tensor x, Tensor dy, {_TABLE}, {_RULE}) -> (Tensor, {_SUMS})")
_library.define(f"gradients_behind(Tensor x, Tensor dy, {_TABLE}, {_RULE}, {_AFFINE}) -> "
                f"(Tensor, {_SUMS}, Tensor, Tensor)")


def _read(arguments):
    """Table, rule and affine map from an operator's arguments behind x or dy."""
    rule = Rule(*arguments[_FIELDS:_FIELDS + _SWITCHES])
    rule = rule._replace(level_range=tuple(rule.level_range), ties_up=tuple(rule.ties_up))
    affine = arguments[_FIELDS + _SWITCHES:] or (None,)  # defaults are not passed on
    return _table_and_affine((*arguments[:_FIELDS], *affine), rule)


def _gradients_of(x, dy, *rest):
    return _as_tensors(KERNELS[x.device.type].gradients(x, dy, *_read(rest)), x)


def _as_tensors(found, x):
    """What an operator returns: a tensor of its own where there is none."""
    return tuple(x.new_empty(0) if each is None else each for each in found)


for _device in KERNELS:
    for _suffix in ("", "_inline"):
        _library.impl(f"quantize{_suffix}", lambda x, *rest: _quantize(x, *_read(rest)), _device.upper())
    for _suffix in ("", "_inline", "_behind"):
        _library.impl(f"gradients{_suffix}", _gradients_of, _device.upper())


@torch.library.register_fake("nulsq::quantize_inline", lib=_library)
@torch.library.register_fake("nulsq::quantize", lib=_library)
def _quantize_like(x, *rest):
    return torch.empty_like(dense(x))


@torch.library.register_fake("nulsq::gradients_inline", lib=_library)
@torch.library.register_fake("nulsq::gradients_behind", lib=_library)
@torch.library.register_fake("nulsq::gradients", lib=_library)
def _gradients_like(x, dy, *rest):
    table, rule, affine = _read(rest)
    sums = *gradient_buffers(table, rule), *map(torch.empty_like, (affine or ())[1:3])
    return torch.empty_like(dense(x)), *_as_tensors(sums, x)


def _keep(ctx, inputs, output):
    x, *rest = inputs
    ctx.rule = Rule(*rest[_FIELDS:_FIELDS + _SWITCHES])
    ctx.save_for_backward(x, *rest[:_FIELDS], *rest[_FIELDS + _SWITCHES:])


def _backward(ctx, dy):
    x, *tensors = ctx.saved_tensors
    rule = sums_asked_for(ctx.rule, ctx.needs_input_grad[:_FIELDS + 1])
    table, rule, affine = _table_and_affine(tensors, rule)
    if affine is None:
        small = (x.device.type == "cpu" and len(rule.ties_up) <= FEW and rule.reduction != "per_cell"
                 and statically_known_true(x.numel() < SMALL))
        found = (torch.ops.nulsq.gradients_inline if small else torch.ops.nulsq.gradients)(x, dy, *table, *rule)
    else:
        found = torch.ops.nulsq.gradients_behind(x, dy, *table, *rule, *affine)
    dx, *rest = _in_order(found, affine)
    return dx, *rest[:_FIELDS], *(None,) * _SWITCHES, *rest[_FIELDS:]


for _suffix in ("", "_inline"):
    torch.library.register_autograd(f"nulsq::quantize{_suffix}", _backward, setup_context=_keep, lib=_library)


@functools.cache
def inline_forward() -> None:
    """From now on Inductor takes the oracle's comparisons for forward: part of what comes before them, they need no
    pass over memory of their own. Backward stays the kernel: Inductor's sums over a whole tensor are passes of theirs;
    but of a small layer's weights these take less time than the call of a kernel. Behind an affine map, and of more
    than MOST_INLINED thresholds, both are the kernel.
    """
    from torch._inductor.decomposition import fast_random_decomps, register_decomposition

    @register_decomposition([torch.ops.nulsq.quantize_inline.default])
    def quantize(x, *rest):
        table, rule, _ = _read(rest)
        return oracle.quantize(x, table, rule)[0].to(x.dtype)

    @register_decomposition([torch.ops.nulsq.gradients_inline.default])
    def gradients(x, dy, *rest):
        table, rule, _ = _read(rest)
        return _as_tensors(oracle.gradients(x, dy, table, rule), x)

    fast_random_decomps.cache_clear()  # Inductor's copy of its table, if anything was compiled before
