"""build_model("pytorchcv:preresnet20_cifar10"): float networks from the three model libraries, by prefix.

`network(recipe, classes)` is what every verb builds: the float network, its starting weights, then quantizers.
"""

import difflib
import socket
import urllib.request
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.config import Recipe
from nulsq.errors import InputError, require
from nulsq.quant.fold import fold_
from nulsq.quant.swap import quantize_
from nulsq.weights import load_weights_

LIBRARIES = ("pytorchcv", "timm", "torchvision")
PATIENCE = 5.0  # seconds for a server of published weights to answer


def build_model(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """A float network with `classes` outputs. `name` is LIBRARY:NAME.

    `pretrained` takes the library's published weights from the library's own cache or server. Where they have another
    number of classes, timm starts the last layer from random numbers, and a warning says so; the others refuse.

    Raises InputError for an unknown library or network (with the near miss), for a class count that the network
    does not offer, and for pretrained weights that are neither cached nor reachable.
    """
    library, _, network = name.partition(":")
    if library not in LIBRARIES or not network:
        raise InputError(f"model.name = {name!r}, allowed: {', '.join(f'{each}:NAME' for each in LIBRARIES)}")
    build, known = {"pytorchcv": _pytorchcv, "timm": _timm, "torchvision": _torchvision}[library]()
    if network not in known:
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
        text = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"model.pretrained: no published weights of {name} with {classes} classes are cached or "
                         f"reachable ({text}); give a file with model.init_from") from None


def network(recipe: Recipe, classes: int, *, start: bool = True, shares: int = 1) -> nn.Module:
    """The recipe's network: built with the run's seed, started from its weights, quantized; not yet calibrated.

    With `start=False` nothing is read from disk: for a checkpoint that holds everything. `shares`: ranks times
    micro-batches, see `quantize_`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model = build_model(recipe.model.name, classes, recipe.model.pretrained and start)
    if start and recipe.model.init_from is not None:
        load_weights_(model, recipe.model.init_from)
    try:
        if not is_float(recipe):
            quantize_(model, recipe.quant, shares=shares)
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


def as_it_runs(model: nn.Module, ranks: int, device: torch.device) -> nn.Module:
    """The calibrated model as a run of so many ranks steps and evaluates it: one network, one rounding.

    Several GPUs share batch-norm statistics; what is left of batch norms and ReLUs before quantizers becomes theirs.
    """
    if ranks > 1 and device.type == "cuda":
        model = sync_batch_norm(model)
    fold_(model)
    return model


def is_float(recipe: Recipe) -> bool:
    """Whether the recipe quantizes nothing: fp on both sides and no enabled rule that says otherwise."""
    quant = recipe.quant.without_preset()
    sides = [quant.weight.quantizer, quant.activation.quantizer]
    for rule in quant.rules.values():
        if rule.enabled:
            sides += [rule.quantizer, rule.weight.quantizer, rule.activation.quantizer]
    return all(side in (None, "fp") for side in sides)


# ---- the libraries: how each builds a network, and the names that it knows


def _pytorchcv():
    provider = require("pytorchcv.model_provider", "train")

    def build(name, classes, pretrained):
        if pretrained and not any(Path("~/.torch/models").expanduser().glob(f"{name}-*.pth")):
            _require_answer("https://github.com")
        return provider.get_model(name, num_classes=classes, pretrained=pretrained)
    return build, list(provider._models)


def _timm():
    timm = require("timm", "train")

    def build(name, classes, pretrained):
        if not pretrained:
            return timm.create_model(name, num_classes=classes)
        # Where the hub does not answer it is told so: it then looks in its cache, and does not try again for minutes.
        hub = require("huggingface_hub.constants", "train")
        offline, answers = hub.HF_HUB_OFFLINE, _answers(hub.ENDPOINT)
        hub.HF_HUB_OFFLINE = offline or not answers
        try:
            model = timm.create_model(name, num_classes=classes, pretrained=True)
        except OSError:
            if answers:
                raise
            raise OSError(f"{urlsplit(hub.ENDPOINT).hostname} does not answer") from None
        finally:
            hub.HF_HUB_OFFLINE = offline
        published = model.pretrained_cfg["num_classes"]
        if published != classes:
            warnings.warn(f"the published weights of timm:{name} have {published} classes, this network has {classes}: "
                          "its last layer starts from random numbers, the others from the weights", stacklevel=3)
        return model
    return build, [*timm.list_models(), *timm.list_pretrained()]  # published weights are named after a dot


def _torchvision():
    models = require("torchvision.models", "train")

    def build(name, classes, pretrained):
        if not pretrained:
            return models.get_model(name, num_classes=classes)
        if classes != 1000:
            raise ValueError("torchvision's have 1000")
        url = models.get_model_weights(name).DEFAULT.url
        if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file():
            _require_answer(url)
        return models.get_model(name, weights="DEFAULT")
    return build, models.list_models(models)


def _answers(url: str) -> bool:
    """Whether a server answers within `PATIENCE`. Behind a proxy nobody knows: then the library has to try."""
    if {"https", "all"} & urllib.request.getproxies().keys():
        return True
    try:
        socket.create_connection((urlsplit(url).hostname, 443), PATIENCE).close()
    except OSError:
        return False
    return True


def _require_answer(url: str) -> None:
    if not _answers(url):
        raise OSError(f"{urlsplit(url).hostname} does not answer")
