"""Oscillating weights: tracked, dampened, frozen (Nagel et al., ICML 2022, arXiv:2203.11086), on the level index.

A weight near a threshold is pushed over it, and back, for as long as training lasts: batch-norm statistics belong to
neither side, and the side that it ends on is chance. The paper counts this on integer weights; here the index of the
level takes their place and the level itself that of the quantized value, so uniform and learned grids, per tensor or
per channel, with normalized weights or not, are treated alike.

After every optimizer step, for each weight, with i_t the index of its level:

    switch       d_t = sign(i_t - i_{t-1}), where that is not zero
    oscillation  o_t = 1 where d_t is the opposite of the last switch's direction, else 0
    frequency    f_t = m o_t + (1 - m) f_{t-1}
    average      a_t = m i_t + (1 - m) a_{t-1}, a_0 = i_0

Freezing: where f_t > threshold(t) the weight is frozen at level round(a_t), for good. After each step it is set to
what that level is by then: the grid goes on learning, gradients and momentum do not move the weight.

Dampening: the loss gets lambda(t) * sum over layers of aggregate((sg[Q(w)] - clip(w, lowest level, highest level))^2),
which pulls weights from the thresholds to the levels; `kernel_mean` sums over the output channels (dimension 0) and
averages over the rest, as the authors do.

Both start at a share `start` of training; lambda rises from 0 and the threshold falls, by half a cosine each.

    oscillations = Oscillations(model, OscillationSettings(freeze_threshold=0.1, freeze_final=0.02))  # calibrated
    for step in range(steps):
        ...                                            # loss + oscillations.dampening(step / steps), optimizer.step()
        oscillations.after_step_((step + 1) / steps)
"""

import math

import torch
from torch import Tensor, nn

from nulsq.quant.layers import QuantConv2d, QuantLinear
from nulsq.quant.settings import OscillationSettings


class OscillationTracker(nn.Module):
    """The state of each weight of one layer, `layer.oscillation`: buffers of the weight's shape, 11 bytes together."""

    def __init__(self, weight: Tensor):
        super().__init__()
        for name, dtype in (("index", torch.uint8),  # level at the last step; of a frozen weight, the one it keeps
                            ("direction", torch.int8),  # of the last switch: -1, 1, or 0 before the first
                            ("frequency", torch.float32), ("average", torch.float32), ("frozen", torch.bool)):
            self.register_buffer(name, torch.zeros_like(weight.detach(), dtype=dtype))

    @torch.no_grad()
    def start_(self, layer: nn.Module) -> None:
        """Take the levels as they are now as those of step 0."""
        index = self._found(layer)
        self.index.copy_(index)
        self.average.copy_(index)

    @torch.no_grad()
    def update_(self, layer: nn.Module, momentum: float, threshold: float | Tensor | None) -> None:
        """Once after each optimizer step. Synchronizes nothing; frozen weights of `layer` are set to their level."""
        index = torch.where(self.frozen, self.index, self._found(layer))
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

    def _found(self, layer):
        low, high = layer.weight_quantizer.level_range
        index = layer.weight_quantizer.level_index(layer.normalized_weight()[0])
        return index.clamp(0, high - low)  # that of a NaN means nothing, but must be one

    def _hold_(self, layer):
        weight, level = layer.weight, layer.weight_quantizer.decode(self.index.long())
        if layer.normalization == "none":
            weight.copy_(torch.where(self.frozen, level, weight))
            return
        # The level is one of the normalized weight. What is frozen must not move the layer's mean and deviation, and
        # with them every other weight's level, step after step: the whole weight is brought back to both.
        mean, deviation = weight.mean(), weight.std()
        held = torch.where(self.frozen, mean + deviation * level, weight)
        held = mean + (held - held.mean()) * (deviation / held.std().clamp(min=1e-12))
        weight.copy_(torch.where(self.frozen.any(), held, weight))


class Oscillations:
    """The trackers of a model's layers, and what is done about oscillating weights. Holds no state of its own.

    Makes the trackers, in place, for every QuantConv2d and QuantLinear whose weight has at most `max_bits`. Their
    state is in the model's state dict: to continue a run, make this first, then load. Several ranks compute the same
    from the same weights.

    Raises ValueError where the model has no such layer, and for contradicting settings.
    """

    def __init__(self, model: nn.Module, settings: OscillationSettings):
        settings.check()
        self.settings = settings
        self.layers = tracked_layers(model, settings.max_bits)
        for layer in self.layers.values():
            layer.oscillation = OscillationTracker(layer.weight)
            if layer.weight_quantizer.calibrated:
                layer.oscillation.start_(layer)

    def after_step_(self, done: float) -> None:
        """Call it after every optimizer step (steps projected), with the share of training done, this step included."""
        self.update_(self.threshold(done))

    def update_(self, threshold: float | Tensor | None) -> None:
        """The same for a threshold [] of freezing; None freezes nothing."""
        for layer in self.layers.values():
            layer.oscillation.update_(layer, self.settings.momentum, threshold)

    def dampening(self, done: float) -> Tensor | None:
        """lambda(t) times the dampening loss, [] with gradients for the weights; None while there is none."""
        factor = self.dampening_factor(done)
        return None if factor is None else self.dampening_by(factor)

    def dampening_by(self, factor: float | Tensor) -> Tensor:
        """The same for a lambda []."""
        return factor * sum(dampening_loss(layer, self.settings.aggregate) for layer in self.layers.values())

    def dampening_factor(self, done: float) -> float | None:
        """lambda at a share of training; None while there is no dampening."""
        return _cosine(done, self.settings.start, 0.0, self.settings.dampening) or None

    def threshold(self, done: float) -> float | None:
        """The freezing threshold at a share of training; None while nothing freezes."""
        first, final = self.settings.freeze_threshold, self.settings.freeze_final
        return None if first is None else _cosine(done, self.settings.start, first, first if final is None else final)

    @torch.no_grad()
    def count(self) -> dict[str, dict[str, int]]:
        """By layer name: how many `weights`, how many of them are `frozen` and how many others are `oscillating`.

        Synchronizes, once.
        """
        trackers, limit = [layer.oscillation for layer in self.layers.values()], self.settings.oscillating_above
        counts = torch.stack([torch.stack([((tracker.frequency > limit) & ~tracker.frozen).sum(),
                                           tracker.frozen.sum()]) for tracker in trackers]).tolist()
        return {name: {"weights": layer.weight.numel(), "oscillating": oscillating, "frozen": frozen}
                for (name, layer), (oscillating, frozen) in zip(self.layers.items(), counts, strict=True)}


def oscillating_fraction(counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """`oscillating_share` and `frozen_share` of all weights together, from `Oscillations.count`."""
    weights = sum(count["weights"] for count in counts.values())
    return {f"{what}_share": sum(count[what] for count in counts.values()) / weights
            for what in ("oscillating", "frozen")}


def tracked_layers(model: nn.Module, max_bits: int) -> dict[str, nn.Module]:
    """Quantized layers whose weight has at most `max_bits`, by name. Raises ValueError where there is none."""
    found = {name: module for name, module in model.named_modules()
             if isinstance(module, QuantConv2d | QuantLinear) and module.weight_quantizer is not None
             and module.weight_quantizer.bits <= max_bits}
    if not found:
        raise ValueError(f"oscillation: no layer has a weight quantizer of at most oscillation.max_bits = {max_bits}")
    return found


def dampening_loss(layer: nn.Module, aggregate: str = "kernel_mean") -> Tensor:
    """Distance of a layer's weights from their levels, see above: [], where the quantizer sees the weight.

    Weights beyond the end levels are at no distance: they cannot oscillate.
    """
    weight, quantizer = layer.normalized_weight()[0], layer.weight_quantizer
    with torch.no_grad():
        level = quantizer(weight)
        levels = quantizer.levels()
        low, high = (end.view(-1, *[1] * (weight.dim() - 1)) for end in (levels[..., 0], levels[..., -1]))
    distance = (level - weight.clamp(low, high)).square()
    if aggregate == "kernel_mean":
        return distance.sum(0).mean()
    return distance.sum() if aggregate == "sum" else distance.mean()


def _cosine(done: float, start: float, first: float, last: float) -> float | None:
    """Half a cosine from `first` at `start` to `last` at 1; None before."""
    if done < start:
        return None
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * (done - start) / (1 - start)))
