"""The one fake-quantize operation that every quantizer declares itself to.

A quantizer says what its levels are (`Table`) and which static rules hold (`Rule`); this package computes output,
level index and gradients. The forms are chosen here and nowhere else, so no quantizer file changes for speed:

    oracle.py   the definition; also what a compiler fuses into one pass, and the form for per-channel tables
    eager.py    fewer passes over memory on the CPU without a compiler
"""

import torch
from torch import Tensor

from nulsq.quant.op.eager import Eager
from nulsq.quant.op.oracle import Oracle, Rule, Table, encode, scale_gradient

__all__ = ["FORMS", "Rule", "Table", "encode", "fake_quantize", "scale_gradient"]

FORMS = {"oracle": Oracle, "eager": Eager}


def fake_quantize(x: Tensor, table: Table, rule: Rule, form: str | None = None) -> Tensor:
    """x -> its level by `rule`; same shape and type. A 2-D table runs over dimension 0 of x. `form` forces one."""
    if form is None:
        lean = x.device.type == "cpu" and table.gaps.dim() == 1 and not torch.compiler.is_compiling()
        form = "eager" if lean else "oracle"
    if table.high is table.gaps:  # a clipping threshold; the compiler takes no tensor twice
        table = table._replace(high=table.high.view_as(table.high))
    return FORMS[form].apply(x, *table, rule)
