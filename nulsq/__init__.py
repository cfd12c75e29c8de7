"""nulsq: quantization-aware training of image classifiers at 2, 3 and 4 bits.

This module needs torch alone. Training is `from nulsq.train import train`, or `python -m nulsq.train RECIPE`.

Names are imported when they are first used (PEP 562): a `--help`, a launcher and the process of a search that starts
trials read recipes, and would otherwise wait for torch and keep 0.3 GB of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nulsq._version import __version__

if TYPE_CHECKING:  # the same for editors and type checkers
    from nulsq.quant.base import Quantizer
    from nulsq.quant.batch_norm import reestimate_batch_norm_
    from nulsq.quant.calibrate import calibrate_
    from nulsq.quant.oscillation import Oscillations
    from nulsq.quant.settings import LayerRule, OscillationSettings, Policy, SideRule
    from nulsq.quant.statistics import Statistics
    from nulsq.quant.step import follow_step_, quantizers_of
    from nulsq.quant.swap import quantize_, summary
    from nulsq.quantizers import available, get_quantizer

_HOMES = {
    "quant.base": ("Quantizer",), "quant.batch_norm": ("reestimate_batch_norm_",), "quant.calibrate": ("calibrate_",),
    "quant.oscillation": ("Oscillations",), "quant.statistics": ("Statistics",),
    "quant.settings": ("LayerRule", "OscillationSettings", "Policy", "SideRule"),
    "quant.step": ("follow_step_", "quantizers_of"), "quant.swap": ("quantize_", "summary"),
    "quantizers": ("available", "get_quantizer"),
}
_HOME = {name: f"nulsq.{module}" for module, names in _HOMES.items() for name in names}

__all__ = ["LayerRule", "OscillationSettings", "Oscillations", "Policy", "Quantizer", "SideRule", "Statistics",
           "__version__", "available", "calibrate_", "follow_step_", "get_quantizer", "quantize_", "quantizers_of",
           "reestimate_batch_norm_", "summary"]


def __getattr__(name: str) -> Any:
    if name in ("quant", "quantizers"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
