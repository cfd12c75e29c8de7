"""build_model("pytorchcv:preresnet20_cifar10"): float networks from the three model libraries, by prefix.

`network(recipe, classes)` is what every verb builds: the float network, its starting weights, then quantizers.
"""

import difflib

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.config import Recipe
from nulsq.errors import InputError, require
from nulsq.quant.swap import quantize_
from nulsq.weights import load_weights_

LIBRARIES = ("pytorchcv", "timm", "torchvision")


def build_model(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """A float network with `classes` outputs. `name` is LIBRARY:NAME.

    Raises InputError for an unknown library or network (with the near miss), for a class count that the network
    does not offer, and for pretrained weights that are neither cached nor reachable.
    """
    library, _, network = name.partition(":")
    if library not in LIBRARIES or not network:
        raise InputError(f"model.name = {name!r}, allowed: {', '.join(f'{each}:NAME' for each in LIBRARIES)}")
    build, known = {"pytorchcv": _pytorchcv, "timm": _timm, "torchvision": _torchvision}[library]()
    if network.partition(".")[0] not in known:  # timm names published weights after a dot
        near = difflib.get_close_matches(network, known, 3, 0.6)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"model.name = {name!r}: {library} has no such network.{hint}")
    try:
        return build(network, classes, pretrained)
    except AssertionError:
        raise InputError(f"model.name = {name!r} cannot be built with {classes} classes "
                         "(pytorchcv's CIFAR networks have 10 or 100)") from None
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        text = " ".join(str(error).split())[:200]
        raise InputError(f"model.pretrained: no published weights of {name} with {classes} classes are cached or "
                         f"reachable ({text}); give a file with model.init_from") from None


def network(recipe: Recipe, classes: int, *, start: bool = True) -> nn.Module:
    """The recipe's network: built with the run's seed, started from its weights, quantized; not yet calibrated.

    With `start=False` nothing is read from disk: for a checkpoint that holds everything.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model = build_model(recipe.model.name, classes, recipe.model.pretrained and start)
    if start and recipe.model.init_from is not None:
        load_weights_(model, recipe.model.init_from)
    try:
        if not is_float(recipe):
            quantize_(model, recipe.quant)
    except ValueError as error:
        raise InputError(str(error)) from None
    return model


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """The model with batch norms that share their statistics over the ranks.

    torch's conversion drops what a subclass adds (timm's BatchNormAct2d has the activation in it): timm's own keeps it.
    Raises InputError for a subclass that neither knows.
    """
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    odd = {type(module) for module in model.modules() if isinstance(module, _BatchNorm) and type(module) not in plain}
    if not odd:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if all(kind.__module__.startswith("timm.") for kind in odd):
        return require("timm.layers", "train").convert_sync_batchnorm(model)
    raise InputError(f"batch norm of several ranks: {', '.join(kind.__name__ for kind in odd)} cannot be converted to "
                     "SyncBatchNorm; freeze it with optim.freeze_bn=true or train on one GPU")


def is_float(recipe: Recipe) -> bool:
    """Whether the recipe quantizes nothing: fp on both sides and no enabled rule that says otherwise."""
    quant = recipe.quant
    sides = [quant.weight.quantizer, quant.activation.quantizer]
    for rule in quant.rules.values():
        if rule.enabled:
            sides += [rule.quantizer, rule.weight.quantizer, rule.activation.quantizer]
    return all(side in (None, "fp") for side in sides)


def _pytorchcv():
    provider = require("pytorchcv.model_provider", "train")
    return (lambda name, classes, pretrained: provider.get_model(name, num_classes=classes, pretrained=pretrained),
            list(provider._models))


def _timm():
    timm = require("timm", "train")
    return (lambda name, classes, pretrained: timm.create_model(name, num_classes=classes, pretrained=pretrained),
            timm.list_models())


def _torchvision():
    models = require("torchvision.models", "train")

    def build(name, classes, pretrained):
        if not pretrained:
            return models.get_model(name, num_classes=classes)
        if classes != 1000:
            raise ValueError("torchvision's have 1000")
        return models.get_model(name, weights="DEFAULT")
    return build, models.list_models(models)
