"""nulsq: quantization-aware training of image classifiers at 2, 3 and 4 bits.

This module needs torch alone. Training is `from nulsq.train import train`, or `python -m nulsq.train RECIPE`.

Names are imported when they are first used (PEP 562): `--help`, launchers and the process that drives a search only
read recipes. They would otherwise wait seconds for torch and keep 0.3 GB of it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nulsq._version import __version__

if TYPE_CHECKING:  # the same names for editors and type checkers
    from nulsq.models.trained import load_run as load_run
    from nulsq.quant.base import Quantizer as Quantizer
    from nulsq.quant.batch_norm import reestimate_batch_norm_ as reestimate_batch_norm_
    from nulsq.quant.calibration.calibrate import calibrate_ as calibrate_
    from nulsq.quant.calibration.statistics import Statistics as Statistics
    from nulsq.quant.dequantize import dequantize_ as dequantize_
    from nulsq.quant.fold import unfold_ as unfold_
    from nulsq.quant.oscillation import Oscillations as Oscillations
    from nulsq.quant.projection import follow_step_ as follow_step_
    from nulsq.quant.projection import quantizers_of as quantizers_of
    from nulsq.quant.quantize import quantize_ as quantize_
    from nulsq.quant.registry import available as available
    from nulsq.quant.registry import get_quantizer as get_quantizer
    from nulsq.quant.settings import LayerRule as LayerRule
    from nulsq.quant.settings import OscillationSettings as OscillationSettings
    from nulsq.quant.settings import Policy as Policy
    from nulsq.quant.settings import SideRule as SideRule
    from nulsq.quant.summary import summary as summary

_MODULES = {
    "LayerRule": "nulsq.quant.settings",
    "OscillationSettings": "nulsq.quant.settings",
    "Oscillations": "nulsq.quant.oscillation",
    "Policy": "nulsq.quant.settings",
    "Quantizer": "nulsq.quant.base",
    "SideRule": "nulsq.quant.settings",
    "Statistics": "nulsq.quant.calibration.statistics",
    "available": "nulsq.quant.registry",
    "calibrate_": "nulsq.quant.calibration.calibrate",
    "dequantize_": "nulsq.quant.dequantize",
    "follow_step_": "nulsq.quant.projection",
    "get_quantizer": "nulsq.quant.registry",
    "load_run": "nulsq.models.trained",
    "quantize_": "nulsq.quant.quantize",
    "quantizers_of": "nulsq.quant.projection",
    "reestimate_batch_norm_": "nulsq.quant.batch_norm",
    "summary": "nulsq.quant.summary",
    "unfold_": "nulsq.quant.fold",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in ("quant", "quantizers"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
