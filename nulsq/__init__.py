"""nulsq: quantization-aware training of image classifiers at 2, 3 and 4 bits.

This module needs torch alone. Training is `from nulsq.train import train`, or `python -m nulsq.train RECIPE`.
"""

from nulsq._version import __version__
from nulsq.quant.base import Quantizer
from nulsq.quant.batch_norm import reestimate_batch_norm_
from nulsq.quant.calibrate import calibrate_
from nulsq.quant.oscillation import Oscillations, OscillationSettings
from nulsq.quant.policy import LayerRule, Policy, SideRule
from nulsq.quant.statistics import Statistics
from nulsq.quant.step import follow_step_, quantizers_of
from nulsq.quant.swap import quantize_, summary
from nulsq.quantizers import available, get_quantizer

__all__ = ["LayerRule", "OscillationSettings", "Oscillations", "Policy", "Quantizer", "SideRule", "Statistics",
           "__version__", "available", "calibrate_", "follow_step_", "get_quantizer", "quantize_", "quantizers_of",
           "reestimate_batch_norm_", "summary"]
