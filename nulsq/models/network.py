"""The network of a recipe: the float network, its starting weights, then quantizers; and its form in training."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.config import Recipe
from nulsq.errors import InputError, require
from nulsq.models.libraries import build_model
from nulsq.models.weights import load_weights_
from nulsq.quant.fold import fold_
from nulsq.quant.oscillation import Oscillations
from nulsq.quant.quantize import quantize_


def build_network(recipe: Recipe, classes: int, *, start: bool = True, batch_shards: int = 1) -> nn.Module:
    """The recipe's network: built with the run's seed, started from its weights, quantized; not yet calibrated.

    Args:
        start: False reads no weights from disk, for a checkpoint that holds everything.
        batch_shards: ranks x micro-batches, see `quantize_`.

    Raises InputError for a network, weights or quantizers that the recipe names wrongly.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model = build_model(recipe.model.name, classes, recipe.model.pretrained and start)
    if start and recipe.model.init_from is not None:
        load_weights_(model, recipe.model.init_from)
    try:
        if not is_float(recipe):
            quantize_(model, recipe.quant, batch_shards=batch_shards)
    except ValueError as error:
        raise InputError(str(error)) from None
    return model


def track_oscillations(recipe: Recipe, model: nn.Module) -> Oscillations | None:
    """Add the trackers that the recipe asks for to the model. Raises InputError where there is nothing to track."""
    try:
        return Oscillations(model, recipe.oscillation) if recipe.oscillation.on else None
    except ValueError as error:
        raise InputError(str(error)) from None


def fold_for_training(model: nn.Module, ranks: int, device: torch.device) -> nn.Module:
    """The calibrated model as a run on this many ranks trains and evaluates it, so that both round alike.

    On several GPUs batch norms share their statistics. Quantizers absorb the batch norms and ReLUs before them.
    """
    if ranks > 1 and device.type == "cuda":
        model = sync_batch_norm(model)
    fold_(model)
    return model


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """The model with batch norms that share their statistics over the ranks.

    torch's conversion drops what a subclass adds (timm's BatchNormAct2d contains the activation); timm's keeps it.
    Raises InputError for a subclass that neither converts.
    """
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    subclasses = {type(module) for module in model.modules()
                  if isinstance(module, _BatchNorm) and type(module) not in plain}
    if not subclasses:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if all(subclass.__module__.startswith("timm.") for subclass in subclasses):
        return require("timm.layers", "train").convert_sync_batchnorm(model)
    raise InputError(f"batch norm on several ranks: {', '.join(subclass.__name__ for subclass in subclasses)} cannot "
                     "be converted to SyncBatchNorm; freeze it with optim.freeze_bn=true or train on one GPU")


def is_float(recipe: Recipe) -> bool:
    """Whether the recipe quantizes nothing: fp on both sides, and no enabled rule with another quantizer."""
    quant = recipe.quant.without_preset()
    sides = [quant.weight.quantizer, quant.activation.quantizer]
    for rule in quant.rules.values():
        if rule.enabled:
            sides += [rule.quantizer, rule.weight.quantizer, rule.activation.quantizer]
    return all(side in (None, "fp") for side in sides)
