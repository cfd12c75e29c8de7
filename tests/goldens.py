"""Reads a directory of reference vectors (`NULSQ_GOLDENS`) and maps its cases to our API. Test support.

The names and the meaning of the arrays are described in the README that lies in such a directory.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch

import nulsq

DIRECTORY = os.environ.get("NULSQ_GOLDENS")
# reference name -> (our quantizer, signed where the name decides it)
OURS = {"LSQ": ("lsq", None), "Positive_nuLSQ": ("nulsq", False), "Symmetric_nuLSQ": ("nulsq", True),
        "MinMax": ("minmax", None)}
NOT_YET = {"LCQ", "APoT"}  # known methods of the reference that this package does not have yet
INITIALIZERS = {"NMSE": "nmse", "LSQ": "lsq", "Const": "const"}
GRAD_SCALES = {None: "none", "LSQ_grad_scale": "channels"}
# The reference's gradient at the ends of the range is an accident of torch's operators: LSQ passes half of it.
STE = {"LSQ": "half"}


def cases(file: str) -> list[dict]:
    """The cases of quantizers.json or preresnet20.json; empty without a directory."""
    return json.loads((Path(DIRECTORY) / file).read_text()) if DIRECTORY else []


def arrays(file: str):
    return np.load(Path(DIRECTORY) / file)


def tensor(store, key) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(store[key]))


def build(case: dict, *, kind: str, bits: int, grad_scale=None, signed=None, init="NMSE") -> nulsq.Quantizer:
    """Our quantizer for a case, with the parity options. KeyError for a name that we do not know."""
    name, sign = OURS[case]
    options = {"signed": sign if signed is None else signed, "grad_scale": GRAD_SCALES[grad_scale],
               "init": INITIALIZERS[init]}
    if case in STE:
        options["ste"] = STE[case]
    if name == "minmax":
        options["range"] = "reference"
    return nulsq.get_quantizer(name)(bits, kind, **options)


def parameter(quantizer: nulsq.Quantizer, key: str):
    """Our parameter for the reference's `scale`; both store nuLSQ steps in the same order."""
    assert key == "scale", f"unknown reference parameter {key!r}"
    (found,) = quantizer.parameters()
    return found


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return float((found.detach() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
