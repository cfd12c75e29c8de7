"""The operation for compilers: operators of torch, and the decompositions that Inductor uses.

    nulsq::quantize                output
    nulsq::gradients               gradients of x and the table
    nulsq::gradients_after_norm    the same and those of an affine map
    nulsq::moments                 mean and variance of each channel
    nulsq::quantize_inline         as quantize, gradients; Inductor may replace them by plain operations
    nulsq::gradients_inline        (see `inline_forward`)

torch.compile, export, fake tensors and CUDA graphs see a node with a shape, a gradient and an implementation for each
device. The arguments after x (and grad_output) are the fields of `Table`, `Rule` and `Affine`, in order. An operator
returns an empty tensor where the kernel returns None.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nulsq.quant.op import reference
from nulsq.quant.op.kernels import KERNELS, TABLE_FIELDS, differentiable_gradients, in_argument_order, table_and_affine
from nulsq.quant.op.layout import dense, gradient_buffers
from nulsq.quant.op.reference import Affine, Rule, Table, compute_dtype, without_unused_sums

MOST_INLINED = 15  # thresholds: the comparisons are unrolled
# Below these sizes Inductor's own backward is faster than a call of the kernel. Each threshold adds a sum.
SMALL_ELEMENTS, SMALL_THRESHOLDS = 2**17, 3

RULE_FIELDS = len(Rule._fields)
_TABLE = "Tensor gaps, Tensor? levels, Tensor? thresholds, Tensor? offset, Tensor? slope"
_RULE = "str index, str ste, str reduction, int[] level_range, bool[] ties_up, float shift, int segments, bool relu"
_AFFINE = "Tensor? mean=None, Tensor? scale=None, Tensor? bias=None, Tensor? rstd=None"
_SUMS = ", ".join(["Tensor"] * 3)

_library = torch.library.Library("nulsq", "DEF")
for _suffix in ("", "_inline"):
    _library.define(f"quantize{_suffix}(Tensor x, {_TABLE}, {_RULE}, {_AFFINE}) -> Tensor")
    _library.define(f"gradients{_suffix}(Tensor x, Tensor grad_output, {_TABLE}, {_RULE}) -> (Tensor, {_SUMS})")
_library.define(f"gradients_after_norm(Tensor x, Tensor grad_output, {_TABLE}, {_RULE}, {_AFFINE}) -> "
                f"(Tensor, {_SUMS}, Tensor, Tensor)")
_library.define("moments(Tensor x) -> (Tensor, Tensor)")


def operator(x: Tensor, table: Table, rule: Rule, affine: Affine | None = None) -> Tensor:
    """The operation as a node of a compiler's graph."""
    if affine is None and len(rule.ties_up) <= MOST_INLINED:
        return torch.ops.nulsq.quantize_inline(x, *table, *rule)
    return torch.ops.nulsq.quantize(x, *table, *rule, *(affine or ()))


# ---- implementations


def _read(arguments: Sequence[Any]) -> tuple[Table, Rule, Affine | None]:
    """Table, rule and affine map from an operator's arguments after x or grad_output."""
    rule = Rule(*arguments[TABLE_FIELDS:TABLE_FIELDS + RULE_FIELDS])
    rule = rule._replace(level_range=(rule.level_range[0], rule.level_range[1]), ties_up=tuple(rule.ties_up))
    table, affine = table_and_affine((*arguments[:TABLE_FIELDS], *arguments[TABLE_FIELDS + RULE_FIELDS:]))
    return table, rule, affine


def _quantize(x: Tensor, *rest: Any) -> Tensor:
    return KERNELS[x.device.type].quantize(x, *_read(rest))


def _gradients(x: Tensor, grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _without_none(KERNELS[x.device.type].gradients(x, grad_output, *_read(rest)), x)


def _without_none(gradients: Sequence[Tensor | None], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


for _device, _kernel in KERNELS.items():
    for _suffix in ("", "_inline"):
        _library.impl(f"quantize{_suffix}", _quantize, _device.upper())
    for _suffix in ("", "_inline", "_after_norm"):
        _library.impl(f"gradients{_suffix}", _gradients, _device.upper())
    _library.impl("moments", _kernel.moments, _device.upper())


@torch.library.register_fake("nulsq::quantize_inline", lib=_library)
@torch.library.register_fake("nulsq::quantize", lib=_library)
def _fake_quantize(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(dense(x))


@torch.library.register_fake("nulsq::gradients_inline", lib=_library)
@torch.library.register_fake("nulsq::gradients_after_norm", lib=_library)
@torch.library.register_fake("nulsq::gradients", lib=_library)
def _fake_gradients(x: Tensor, grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    table, rule, affine = _read(rest)
    norm_sums = () if affine is None else map(torch.empty_like, (affine.scale, affine.bias))
    return torch.empty_like(dense(x)), *_without_none((*gradient_buffers(table, rule), *norm_sums), x)


@torch.library.register_fake("nulsq::moments", lib=_library)
def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(2))
    return mean, var


# ---- gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *rest = inputs
    ctx.rule = Rule(*rest[TABLE_FIELDS:TABLE_FIELDS + RULE_FIELDS])
    ctx.save_for_backward(x, *rest[:TABLE_FIELDS], *rest[TABLE_FIELDS + RULE_FIELDS:])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    rule = without_unused_sums(ctx.rule, ctx.needs_input_grad[:TABLE_FIELDS + 1])
    table, affine = table_and_affine(tensors)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True: a kernel has no derivative
        gradients = differentiable_gradients(x, grad_output, table, rule, affine)
    elif affine is None:
        small = (x.device.type == "cpu" and len(rule.ties_up) <= SMALL_THRESHOLDS and rule.reduction != "per_cell"
                 and statically_known_true(x.numel() < SMALL_ELEMENTS))
        gradients_of = torch.ops.nulsq.gradients_inline if small else torch.ops.nulsq.gradients
        gradients = gradients_of(x, grad_output, *table, *rule)
    else:
        gradients = torch.ops.nulsq.gradients_after_norm(x, grad_output, *table, *rule, *affine)
    grad_input, *rest = in_argument_order(gradients, affine)
    return grad_input, *rest[:TABLE_FIELDS], *(None,) * RULE_FIELDS, *rest[TABLE_FIELDS:]


for _suffix in ("", "_inline"):
    torch.library.register_autograd(f"nulsq::quantize{_suffix}", _backward, setup_context=_setup_context, lib=_library)


# ---- decompositions


@functools.cache
def inline_forward() -> None:
    """From now on Inductor replaces `quantize_inline` and `gradients_inline` by the reference form's comparisons.

    Forward then fuses with the operations before it and needs no pass over memory of its own. Backward stays the
    kernel, because Inductor's sums over a whole tensor are separate passes; except for small tensors, for which the
    passes take less time than a call of the kernel. After an affine map, and with more than MOST_INLINED thresholds,
    both directions are the kernel.

    Inductor's table of decompositions is private. The public `torch.compile(backend=aot_autograd(decompositions=...))`
    replaces Inductor's whole pipeline.
    """
    from torch._inductor.decomposition import fast_random_decomps, register_decomposition

    @register_decomposition([torch.ops.nulsq.quantize_inline.default])
    def quantize(x: Tensor, *rest: Any) -> Tensor:
        table, rule, _ = _read(rest)
        return reference.quantize(x, table, rule)[0].to(x.dtype)

    @register_decomposition([torch.ops.nulsq.gradients_inline.default])
    def gradients(x: Tensor, grad_output: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        table, rule, _ = _read(rest)
        return _without_none(reference.gradients(x, grad_output, table, rule), x)

    fast_random_decomps.cache_clear()  # Inductor's copy of its table, if something was compiled before
