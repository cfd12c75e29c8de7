"""The fake-quantize operation that all quantizers share.

A quantizer declares its levels (`Table`) and its static rules (`Rule`). This package computes output, level index and
gradients, in one of three forms:

    reference   the definition, in plain PyTorch; a compiler can fuse it
    eager       plain PyTorch with fewer passes over memory; CPU, per-tensor tables
    fused       one pass in each direction by a compiled kernel: C++ on the CPU, Triton on a GPU

The form is chosen here and nowhere else, so no quantizer file changes for speed: fused where its kernel can be
compiled, else eager or reference. `force("reference")` overrides the choice. Under a torch.func transform, and for the
straight-through rules `clip_open` and `half`, the form is always reference.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nulsq.quant.op.eager import Eager
from nulsq.quant.op.fused import fused, requantized
from nulsq.quant.op.inductor import inline_forward
from nulsq.quant.op.kernels import available, takes_affine
from nulsq.quant.op.reference import Affine, Reference, Rule, Table, encode, quantize, scale_gradient, under_transform

__all__ = ["FORMS", "Affine", "Rule", "Table", "available", "encode", "fake_quantize", "force", "inline_forward",
           "requantized", "scale_gradient"]

FORMS: dict[str, Callable[[Tensor, Table, Rule], Tensor]] = {
    "reference": lambda x, table, rule: Reference.apply(x, *table, rule),
    "eager": lambda x, table, rule: Eager.apply(x, *table, rule),
    "fused": fused,
}
FAST_STE_RULES = ("clip", "none")  # the other rules reproduce other implementations and have the reference form only
_forced: str | None = None


def fake_quantize(x: Tensor, table: Table, rule: Rule, form: str | None = None,
                  affine: Affine | None = None) -> Tensor:
    """x -> its level by `rule`; same shape and type. A 2-D table has a row for each index of dimension 0 of x.

    form: a key of FORMS that overrides the choice.
    affine: a map of x before it is quantized, in the same pass where a kernel can do both; for per-tensor tables.
    """
    if torch.jit.is_tracing():  # for inference: plain operations, which TorchScript can store
        return quantize(x if affine is None else affine.of(x), table, rule)[0].to(x.dtype)
    form = "reference" if needs_reference(rule) else form or _forced or _choose(x, table)
    if affine is None:
        return FORMS[form](x, table, rule)
    if form == "fused" and takes_affine(x, rule):
        return fused(x, table, rule, affine)
    return FORMS[form](affine.of(x), table, rule).to(x.dtype)


def needs_reference(rule: Rule) -> bool:
    """Whether only the reference form can be used, even if another one is forced."""
    return rule.ste not in FAST_STE_RULES or under_transform()


def _choose(x: Tensor, table: Table) -> str:
    if available(x.device.type):
        return "fused"
    if torch.compiler.is_compiling():
        return "reference"
    return "eager" if x.device.type == "cpu" and table.gaps.dim() == 1 else "reference"


@contextlib.contextmanager
def force(form: str | None) -> Iterator[None]:
    """Within the context all quantizers use this form; None: the usual choice. Raises ValueError for unknown names."""
    global _forced
    if form is not None and form not in FORMS:
        raise ValueError(f"form = {form!r}, allowed: {', '.join(FORMS)}")
    before, _forced = _forced, form
    try:
        yield
    finally:
        _forced = before
