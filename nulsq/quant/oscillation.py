"""Oscillating weights: tracked, dampened, frozen (Nagel et al., ICML 2022, arXiv:2203.11086), on the level index.

Gradients push a weight near a threshold back and forth across it for as long as training lasts. Batch-norm statistics
then fit neither level, and chance decides which level the weight has at the end. The paper counts oscillations of
integer weights. Here the index of the level replaces the integer, and the level replaces the quantized value. So
uniform and learned grids, per tensor or per channel, with or without weight normalization, are treated alike.

After every optimizer step, for each weight, with i_t the index of its level:

    switch       d_t = sign(i_t - i_{t-1}), where that is not zero
    oscillation  o_t = 1 where d_t is opposite to the direction of the last switch, else 0
    frequency    f_t = m o_t + (1 - m) f_{t-1}
    average      a_t = m i_t + (1 - m) a_{t-1}, a_0 = i_0

Freezing: where f_t > threshold(t), the weight is frozen at level round(a_t) until the end. After each step it is set to
the current value of that level: the grid keeps learning, but gradients and momentum do not move the weight.

Dampening: lambda(t) * sum over layers of aggregate((sg[Q(w)] - clip(w, lowest level, highest level))^2) is added to the
loss (sg: no gradient). It pulls weights from the thresholds to the levels. The aggregate `kernel_mean` sums over the
output channels (dimension 0) and averages over the rest, as the authors do.

Both start after the share `start` of training. Then lambda rises from 0 and the threshold falls, each along half a
cosine.

    oscillations = Oscillations(model, OscillationSettings(freeze_threshold=0.1, freeze_final=0.02))  # calibrated
    for step in range(steps):
        ...                                            # loss + oscillations.dampening(step / steps), optimizer.step()
        oscillations.after_step_((step + 1) / steps)
"""

import math

import torch
from torch import Tensor, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import ProductLayer, QuantizedLayer, weight_parameter
from nulsq.quant.settings import OscillationSettings


class OscillationTracker(nn.Module):
    """State of the weights of one layer, in `layer.oscillation`: buffers of the weight's shape, 11 bytes per weight."""

    index: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        for name, dtype in (("index", torch.uint8),  # of the level after the last step; fixed for a frozen weight
                            ("direction", torch.int8),  # of the last switch: -1, 1, or 0 before the first
                            ("frequency", torch.float32), ("average", torch.float32), ("frozen", torch.bool)):
            self.register_buffer(name, torch.zeros_like(weight.detach(), dtype=dtype))

    @torch.no_grad()
    def start_(self, layer: QuantizedLayer) -> None:
        """Record the current levels as those of step 0."""
        index = _level_index(layer)
        self.index.copy_(index)
        self.average.copy_(index)

    @torch.no_grad()
    def update_(self, layer: QuantizedLayer, momentum: float, threshold: float | Tensor | None) -> None:
        """Call it once after each optimizer step. Sets frozen weights of `layer` to their level.

        threshold: weights of a higher frequency are frozen; None freezes nothing. No device synchronization.
        """
        index = torch.where(self.frozen, self.index, _level_index(layer))
        direction = (index - self.index).sign()
        oscillates = direction * self.direction == -1
        self.frequency.lerp_(oscillates.to(self.frequency.dtype), momentum)
        self.average.lerp_(index.to(self.average.dtype), momentum)
        self.direction.copy_(torch.where(direction == 0, self.direction, direction))
        self.index.copy_(index)
        if threshold is not None:
            new = (self.frequency > threshold) & ~self.frozen
            self.index.copy_(torch.where(new, self.average.round(), self.index))
            self.frozen.logical_or_(new)
            self._hold_(layer)

    def _hold_(self, layer: QuantizedLayer) -> None:
        """Set the frozen weights to their levels."""
        weight, level = layer.weight, _weight_quantizer(layer).decode(self.index.long())
        if layer.normalization == "none":
            weight.copy_(torch.where(self.frozen, level, weight))
            return
        # The level is one of the normalized weight. Setting frozen weights would change the layer's mean and deviation,
        # and with them the levels of all other weights, in every step. So the whole weight is shifted and scaled to
        # have the previous mean and deviation.
        mean, deviation = weight.mean(), weight.std()
        held = torch.where(self.frozen, mean + deviation * level, weight)
        held = mean + (held - held.mean()) * (deviation / held.std().clamp(min=1e-12))
        weight.copy_(torch.where(self.frozen.any(), held, weight))


class Oscillations:
    """Tracks, dampens and freezes oscillating weights of a model. All its state is in the model.

    The constructor adds a tracker to every layer whose weight has at most `max_bits` (see `tracked_layers`). Trackers
    are part of the model's state dict: to continue a run, construct this first, then load. All ranks compute the same
    values from the same weights.

    Raises:
        ValueError: the model has no such layer, or settings contradict each other.
    """

    def __init__(self, model: nn.Module, settings: OscillationSettings):
        settings.check()
        self.settings = settings
        self.layers = tracked_layers(model, settings.max_bits)
        for layer in self.layers.values():
            layer.oscillation = OscillationTracker(layer.weight)
            if _weight_quantizer(layer).calibrated:
                layer.oscillation.start_(layer)

    def after_step_(self, done: float) -> None:
        """Call it after every optimizer step and the projection of the quantizers.

        done: share of training that is done, this step included.
        """
        self.update_(self.threshold(done))

    def update_(self, threshold: float | Tensor | None) -> None:
        """As `after_step_`, with the freezing threshold [] as an argument; None freezes nothing."""
        for layer in self.layers.values():
            _tracker(layer).update_(layer, self.settings.momentum, threshold)

    def dampening(self, done: float) -> Tensor | None:
        """lambda(t) times the dampening loss, [], with gradients for the weights; None before it starts.

        done: share of training that is done.
        """
        factor = self.dampening_factor(done)
        return None if factor is None else self.dampening_by(factor)

    def dampening_by(self, factor: float | Tensor) -> Tensor:
        """As `dampening`, with lambda [] as an argument."""
        losses = [dampening_loss(layer, self.settings.aggregate) for layer in self.layers.values()]
        return factor * sum(losses[1:], losses[0])

    def dampening_factor(self, done: float) -> float | None:
        """lambda at a share of training; None before dampening starts."""
        return _cosine(done, self.settings.start, 0.0, self.settings.dampening) or None

    def threshold(self, done: float) -> float | None:
        """The freezing threshold at a share of training; None before freezing starts."""
        first, final = self.settings.freeze_threshold, self.settings.freeze_final
        return None if first is None else _cosine(done, self.settings.start, first, first if final is None else final)

    @torch.no_grad()
    def count(self) -> dict[str, dict[str, int]]:
        """By layer name: number of `weights`, of `frozen` ones and of other `oscillating` ones.

        Synchronizes with the device once.
        """
        trackers, limit = [_tracker(layer) for layer in self.layers.values()], self.settings.oscillating_above
        counts = torch.stack([torch.stack([((tracker.frequency > limit) & ~tracker.frozen).sum(),
                                           tracker.frozen.sum()]) for tracker in trackers]).tolist()
        return {name: {"weights": layer.weight.numel(), "oscillating": oscillating, "frozen": frozen}
                for (name, layer), (oscillating, frozen) in zip(self.layers.items(), counts, strict=True)}


def oscillating_fraction(counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """`oscillating_share` and `frozen_share` of the weights of all layers, from `Oscillations.count`."""
    weights = sum(count["weights"] for count in counts.values())
    return {f"{state}_share": sum(count[state] for count in counts.values()) / weights
            for state in ("oscillating", "frozen")}


def tracked_layers(model: nn.Module, max_bits: int) -> dict[str, QuantizedLayer]:
    """Quantized layers whose weight has at most `max_bits`, by name. Raises ValueError where there is none.

    Left out are layers whose weight is computed from other parameters: freezing could not write it.
    """
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None
              and module.weight_quantizer.bits <= max_bits and _owns_weight(module)}
    if not layers:
        raise ValueError(f"oscillation: no layer has a weight quantizer of at most oscillation.max_bits = {max_bits}")
    return layers


def dampening_loss(layer: QuantizedLayer, aggregate: str = "kernel_mean") -> Tensor:
    """Squared distance of a layer's normalized weights from their levels, see above: [].

    Weights beyond the end levels have distance 0, because they cannot oscillate.
    """
    weight, quantizer = layer.normalized_weight()[0], _weight_quantizer(layer)
    with torch.no_grad():
        level = quantizer(weight)
        levels = quantizer.levels()
        low, high = (end.view(-1, *[1] * (weight.dim() - 1)) for end in (levels[..., 0], levels[..., -1]))
    distance = (level - weight.clamp(low, high)).square()
    if aggregate == "kernel_mean":
        return distance.sum(0).mean()
    return distance.sum() if aggregate == "sum" else distance.mean()


def _owns_weight(layer: nn.Module) -> bool:
    """Whether the quantizer gets a parameter of the layer as it is, up to normalization."""
    return not isinstance(layer, ProductLayer) and weight_parameter(layer) is not None


def _weight_quantizer(layer: QuantizedLayer) -> Quantizer:
    assert layer.weight_quantizer is not None  # `tracked_layers` selects only layers that have one
    return layer.weight_quantizer


def _tracker(layer: QuantizedLayer) -> OscillationTracker:
    assert isinstance(layer.oscillation, OscillationTracker)
    return layer.oscillation


def _level_index(layer: QuantizedLayer) -> Tensor:
    """Indices of the levels of a layer's weights. That of a NaN weight is arbitrary, but valid."""
    low, high = _weight_quantizer(layer).level_range
    return _weight_quantizer(layer).level_index(layer.normalized_weight()[0]).clamp(0, high - low)


def _cosine(done: float, start: float, first: float, last: float) -> float | None:
    """Half a cosine from `first` at `start` to `last` at 1; None before `start`."""
    if done < start:
        return None
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * (done - start) / (1 - start)))
