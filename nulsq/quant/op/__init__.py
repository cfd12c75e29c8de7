"""The one fake-quantize operation that every quantizer declares itself to.

A quantizer says what its levels are (`Table`) and which static rules hold (`Rule`); this package computes
output, level index and gradients. Today there is one form, `oracle.py`, in plain PyTorch; faster forms stand
beside it and are chosen here, so that no quantizer file ever changes for speed.
"""

from nulsq.quant.op.oracle import Rule, Table, encode, fake_quantize, scale_gradient

__all__ = ["Rule", "Table", "encode", "fake_quantize", "scale_gradient"]
