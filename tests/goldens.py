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
        "MinMax": ("minmax", None), "LCQ": ("lcq", None), "APoT": ("apot", None)}
INITIALIZERS = {"NMSE": "nmse", "LSQ": "lsq", "Const": "const"}
GRAD_SCALES = {None: "none", "LSQ_grad_scale": "channels"}
# The reference's gradient at the ends of the range is an accident of torch's operators: LSQ passes half, APoT none.
STE = {"LSQ": "half", "APoT": "clip_open"}
CONSTANTS = {"dst"}  # arrays among the parameters that are none: LCQ's interval ends k / 16


def cases(file: str) -> list[dict]:
    """The cases of quantizers.json or preresnet20.json; empty without a directory."""
    return json.loads((Path(DIRECTORY) / file).read_text()) if DIRECTORY else []


def arrays(file: str):
    return np.load(Path(DIRECTORY) / file)


def tensor(store, key) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(store[key]))


def build(case: str, *, kind: str, bits: int, grad_scale: str | None = None, signed: bool | None = None,
          init: str = "NMSE", default_rule: bool = False) -> nulsq.Quantizer:
    """Our quantizer for a case, with the parity options; default_rule: with our own rule for the ends of the range.

    Raises KeyError for a name that we do not know.
    """
    name, sign = OURS[case]
    if case == "LCQ" and kind == "activation" and signed:
        bits += 1  # the reference has 2^bits - 1 levels on each side: our signed grid of one bit more
    options = {"signed": sign if signed is None else signed, "grad_scale": GRAD_SCALES[grad_scale],
               "init": INITIALIZERS[init], "ste": None if default_rule else ste(case, kind, bits)}
    if name == "minmax":
        options["range"] = "reference"
    return nulsq.get_quantizer(name)(bits, kind, **options)


def ste(case: str, kind: str, bits: int) -> str | None:
    """The parity option for the ends of the range; APoT's 2-bit weights pass everything, as ours do."""
    return None if (case, kind, bits) == ("APoT", "weight", 2) else STE.get(case)


PARAMETERS = {"lsq": {"scale": "step"}, "nulsq": {"scale": "steps"},
              "lcq": {"threshold": "alpha", "companding_params": "theta", "theta": "theta"},
              "apot": {"threshold": "alpha"}}


def parameter(quantizer: nulsq.Quantizer, key: str) -> torch.Tensor:
    """Our parameter for the reference's name of it; both store nuLSQ steps in the same order."""
    return getattr(quantizer, PARAMETERS[quantizer.name()][key])


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return float((found.detach() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
