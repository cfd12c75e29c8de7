"""The teacher of a distillation: a published network, one with weights from a file, or a run of this project."""

from pathlib import Path

import torch
from torch import nn

from nulsq.config import Recipe
from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.models.libraries import LIBRARIES, build_model
from nulsq.models.weights import load_weights_
from nulsq.run import checkpoint
from nulsq.run.directory import read_recipe
from nulsq.training.state import trained_network


def build_teacher(recipe: Recipe, classes: int, ranks: Ranks) -> nn.Module | None:
    """The recipe's teacher on this rank's device, in evaluation mode, without gradients; None where it has none.

    `distill.teacher` is LIBRARY:NAME, with the weights in `distill.weights` or else the published ones, or a run
    directory, float or quantized, of which the network that evaluation sees is taken. It gets the student's images,
    normalized as the student's are. A collective call; writes nothing.

    Raises InputError for a network or run that does not exist, and for one of another number of classes.
    """
    settings = recipe.distill
    if settings.teacher is None:
        return None
    if settings.teacher.partition(":")[0] in LIBRARIES:
        teacher = _of_library(settings, classes, ranks)
    elif Path(settings.teacher).is_dir():
        teacher = _of_run(Path(settings.teacher), classes)
    else:
        raise InputError(f"distill.teacher = {settings.teacher!r}: no such run directory; allowed: a run directory, "
                         f"{', '.join(f'{library}:NAME' for library in LIBRARIES)}")
    memory = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
    return teacher.eval().requires_grad_(False).to(ranks.device, memory_format=memory)


def _of_library(settings, classes, ranks):
    published = settings.weights is None
    try:
        if published and torch.distributed.is_initialized():
            # one rank downloads, the others find the file
            ranks.on_first(lambda: build_model(settings.teacher, classes, pretrained=True) and None)
        teacher = build_model(settings.teacher, classes, pretrained=published)
    except InputError as error:
        text = str(error)
        for theirs, ours in (("model.name", "distill.teacher"), ("model.pretrained", "distill.teacher"),
                             ("model.init_from", "distill.weights")):
            text = text.replace(theirs, ours)
        raise InputError(text) from None
    if not published:
        load_weights_(teacher, settings.weights, "distill.weights")
        return teacher
    found = getattr(teacher, "pretrained_cfg", {}).get("num_classes", classes)  # timm starts another last layer anew
    if found != classes:
        raise InputError(f"distill.teacher = {settings.teacher!r} has {found} classes, the data set has {classes}")
    return teacher


def _of_run(run, classes):
    try:
        return trained_network(read_recipe(run), checkpoint.best_or_last(run), classes)
    except InputError as error:
        raise InputError(f"distill.teacher = {str(run)!r} cannot teach {classes} classes: {error}") from None
