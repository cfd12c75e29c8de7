"""The one fake-quantize operation that every quantizer declares itself to.

A quantizer says what its levels are (`Table`) and which static rules hold (`Rule`); this package computes output,
level index and gradients. The form is chosen here and nowhere else, so no quantizer file changes for speed:

    oracle   the definition, in plain PyTorch; a compiler can fuse it
    eager    plain PyTorch with fewer passes over memory; CPU, per-tensor tables
    fused    one pass in each direction: C++ on the CPU (cpu.py), Triton on a GPU (gpu.py)

fused wherever its kernel can be compiled, else eager or oracle. `force("oracle")` and the like override the choice.
Under a torch.func transform, and for the straight-through rules `clip_open` and `half`, it is always the oracle.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from nulsq.quant.op.eager import Eager
from nulsq.quant.op.fused import available, fused, inline_forward, requantized, takes_affine
from nulsq.quant.op.reference import Affine, Oracle, Rule, Table, encode, scale_gradient, under_transform

__all__ = ["FORMS", "Affine", "Rule", "Table", "available", "encode", "fake_quantize", "force", "inline_forward",
           "requantized", "scale_gradient"]

FORMS = {
    "oracle": lambda x, table, rule: Oracle.apply(x, *table, rule),
    "eager": lambda x, table, rule: Eager.apply(x, *table, rule),
    "fused": fused,
}
FAST_STE_RULES = ("clip", "none")  # the others of `Rule.ste` are there to reproduce other implementations
_forced: str | None = None


def fake_quantize(x: Tensor, table: Table, rule: Rule, form: str | None = None,
                  affine: Affine | None = None) -> Tensor:
    """x -> its level by `rule`; same shape and type. A 2-D table runs over dimension 0 of x. `form` forces one.

    affine: what x goes through before that, of one pass with it where there is a kernel for both; per-tensor tables.
    """
    form = "oracle" if needs_reference(rule) else form or _forced or _choose(x, table)
    if affine is None:
        return FORMS[form](x, table, rule)
    if form == "fused" and takes_affine(x, rule):
        return fused(x, table, rule, affine)
    return FORMS[form](affine.of(x), table, rule).to(x.dtype)


def needs_reference(rule: Rule) -> bool:
    """Whether only the definition in plain PyTorch will do, whatever is forced."""
    return rule.ste not in FAST_STE_RULES or under_transform()


def _choose(x, table):
    if available(x.device.type):
        return "fused"
    if torch.compiler.is_compiling():
        return "oracle"
    return "eager" if x.device.type == "cpu" and table.gaps.dim() == 1 else "oracle"


@contextlib.contextmanager
def force(form: str | None) -> Iterator[None]:
    """Within it every quantizer takes this form; None: the usual choice. Raises ValueError for an unknown name."""
    global _forced
    if form is not None and form not in FORMS:
        raise ValueError(f"form = {form!r}, allowed: {', '.join(FORMS)}")
    before, _forced = _forced, form
    try:
        yield
    finally:
        _forced = before
