"""The exponential moving average of a network's weights: what is evaluated where `optim.ema_decay` is set.

    a_t = d a_{t-1} + (1 - d) w_t,   d = min(decay, (1 + t) / (10 + t)) after step t

The average starts at the network's starting point; the warm-up of d lets it forget that within a few steps. It covers
every floating-point tensor of the state dict: weights, quantizer parameters (positive ones have a positive average),
ranges and batch-norm statistics. Integers, flags and the counts of oscillation trackers are not averaged.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nulsq.quant.oscillation import OscillationTracker


class WeightAverage:
    """The average of a model's weights, on its device. `values` by state dict key, for a checkpoint.

    Create it when the model's tensors are final: it refers to them, and training changes them in place.
    """

    def __init__(self, model: nn.Module, decay: float):
        own = {f"{name}.{key}" for name, module in model.named_modules() if isinstance(module, OscillationTracker)
               for key in module.state_dict()}
        self.decay = decay
        self.sources = {key: value for key, value in model.state_dict().items()
                        if value.is_floating_point() and key not in own}
        self.values = {key: value.clone() for key, value in self.sources.items()}

    @torch.no_grad()
    def update_(self, step: int) -> None:
        """After step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.sources.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averages, and changes of it change them. Undone bit for bit at the end."""
        self._exchange(list(self.values))
        try:
            yield
        finally:
            self._exchange(reversed(self.values))  # reversed: a tensor that two layers share is listed twice

    def load_(self, values: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's averages. Raises KeyError where one is missing."""
        for key, value in self.values.items():
            value.copy_(values[key])

    @torch.no_grad()
    def _exchange(self, keys: Iterable[str]) -> None:
        for key in keys:
            source, value = self.sources[key], self.values[key]
            before = source.clone()
            source.copy_(value)
            value.copy_(before)
