"""report(model, batches): measurements of every layer of a network in evaluation mode."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nulsq.cost import Cost, LayerCost, cost_of
from nulsq.inspect.fidelity import Fidelity
from nulsq.quant.calibration.batches import images_of
from nulsq.quant.modes import in_evaluation
from nulsq.quant.policy import layers_of, roles
from nulsq.quant.settings import OscillationSettings


@dataclass
class LayerReport:
    """A convolution or linear layer."""

    name: str
    class_name: str  # QuantConv2d, Linear, ...
    roles: list[str]  # see `nulsq.quant.policy`
    normalization: str  # of the weight before it is quantized
    weight: Fidelity | None  # None: float
    activation: Fidelity | None
    cost: LayerCost
    oscillating: float | None  # share of the weights; None: not tracked, see `nulsq.quant.oscillation`
    frozen: float | None  # likewise


@dataclass
class Report:
    """A network."""

    layers: list[LayerReport]  # in the order of definition
    cost: Cost
    images: int  # number of images that activations were measured on


@torch.no_grad()
def report(model: nn.Module, batches: Iterable[Any], *,
           oscillating_above: float = OscillationSettings.oscillating_above) -> Report:
    """Measure every quantizer of a model and count the model's cost. The model does not change.

    Activations are measured at the input of each quantizer of the quantized network, one batch at a time, so memory
    does not grow with the number of batches. The report of a float model has only its cost.

    Args:
        model: calibrated or trained, float or quantized, not folded.
        batches: as `calibrate_` takes them; at least one.
        oscillating_above: frequency above which a tracked weight counts as oscillating.

    Raises:
        ValueError: there is no batch.
    """
    layers = layers_of(model)
    weights, activations = ({name: Fidelity(quantizer) for name, layer in layers.items()
                             if (quantizer := getattr(layer, side, None)) is not None}
                            for side in ("weight_quantizer", "activation_quantizer"))
    for name, fidelity in weights.items():
        layer: Any = layers[name]
        fidelity.add(layer.normalized_weight()[0])

    device = next(model.parameters()).device
    cost, images, handles = None, 0, []
    try:
        with in_evaluation(model):
            for x in images_of(batches, device):
                if cost is None:
                    cost = cost_of(model, x[:1])
                    handles = [fidelity.quantizer.register_forward_pre_hook(_adds_input_to(fidelity))
                               for fidelity in activations.values()]
                model(x)
                images += len(x)
    finally:
        for handle in handles:
            handle.remove()
    if cost is None:
        raise ValueError("report: there is no batch; give at least one")

    of_layer = {name: [role for role, names in roles(model).items() if name in names] for name in layers}
    return Report([LayerReport(name, type(layer).__name__, of_layer[name], getattr(layer, "normalization", "none"),
                               weights.get(name), activations.get(name), cost.layers[name],
                               *_oscillations(layer, oscillating_above))
                   for name, layer in layers.items()], cost, images)


def _oscillations(layer: nn.Module, above: float) -> tuple[float | None, float | None]:
    """Shares of oscillating and of frozen weights."""
    tracker = getattr(layer, "oscillation", None)
    if tracker is None:
        return None, None
    return float((tracker.frequency > above).double().mean()), float(tracker.frozen.double().mean())


def _adds_input_to(fidelity: Fidelity) -> Callable[..., None]:
    return lambda quantizer, args: fidelity.add(args[0])
