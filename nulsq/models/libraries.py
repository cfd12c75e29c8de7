"""build_model("pytorchcv:preresnet20_cifar10"): float networks from three model libraries, by prefix."""

import socket
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import nn

from nulsq.errors import InputError, did_you_mean, require

LIBRARIES = ("pytorchcv", "timm", "torchvision")
TIMEOUT = 5.0  # seconds for a server of published weights to answer
Build = Callable[[str, int, bool], nn.Module]  # name, classes, pretrained


def build_model(name: str, classes: int, pretrained: bool = False) -> nn.Module:
    """A float network with `classes` outputs. `name` is LIBRARY:NAME.

    `pretrained` takes the library's published weights from its cache or server. Where these have another number of
    classes, timm starts the last layer from random numbers, with a warning; the other libraries refuse.

    Raises InputError for an unknown library or network (with the near miss), for a number of classes that the network
    does not offer, and for pretrained weights that are neither cached nor reachable.
    """
    library, _, network = name.partition(":")
    if library not in LIBRARIES or not network:
        raise InputError(f"model.name = {name!r}, allowed: {', '.join(f'{prefix}:NAME' for prefix in LIBRARIES)}")
    build, names = {"pytorchcv": _pytorchcv, "timm": _timm, "torchvision": _torchvision}[library]()
    if network not in names:
        hint = did_you_mean(network, names, count=3, cutoff=0.6)
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


# ---- the libraries: how each builds a network, and the names of its networks


def _pytorchcv() -> tuple[Build, list[str]]:
    provider = require("pytorchcv.model_provider", "train")

    def build(name: str, classes: int, pretrained: bool) -> nn.Module:
        if pretrained and not any(Path("~/.torch/models").expanduser().glob(f"{name}-*.pth")):
            _require_answer("https://github.com")
        return provider.get_model(name, num_classes=classes, pretrained=pretrained)
    # pytorchcv has no public list of its networks; `get_model` alone would raise ValueError without near misses.
    return build, list(provider._models)


def _timm() -> tuple[Build, list[str]]:
    timm = require("timm", "train")

    def build(name: str, classes: int, pretrained: bool) -> nn.Module:
        if not pretrained:
            return timm.create_model(name, num_classes=classes)
        # Where the hub does not answer, the offline flag makes it look in its cache at once instead of retrying for
        # minutes. The hub reads it from the environment at import only, hence the module's attribute.
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
    return build, [*timm.list_models(), *timm.list_pretrained()]  # names of published weights follow a dot


def _torchvision() -> tuple[Build, list[str]]:
    models = require("torchvision.models", "train")

    def build(name: str, classes: int, pretrained: bool) -> nn.Module:
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
    """Whether a server answers within TIMEOUT. Behind a proxy this cannot be known, and the library has to try."""
    if {"https", "all"} & urllib.request.getproxies().keys():
        return True
    try:
        socket.create_connection((urlsplit(url).hostname, 443), TIMEOUT).close()
    except OSError:
        return False
    return True


def _require_answer(url: str) -> None:
    if not _answers(url):
        raise OSError(f"{urlsplit(url).hostname} does not answer")
