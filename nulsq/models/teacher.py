"""The teacher of a distillation: a published network, one with weights from a file, or a run of this project."""

from pathlib import Path

from torch import nn

from nulsq.config import Distill, Recipe
from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.models.libraries import LIBRARIES, build_model
from nulsq.models.trained import trained_network
from nulsq.models.weights import load_weights_
from nulsq.run import checkpoint
from nulsq.run.directory import read_recipe
from nulsq.tensor_format import place


def build_teacher(recipe: Recipe, classes: int, ranks: Ranks) -> nn.Module | None:
    """The recipe's teacher on this rank's device, in evaluation mode, without gradients; None where it has none.

    `distill.teacher` is LIBRARY:NAME, with the weights in `distill.weights` or else the published ones; or a run
    directory, float or quantized, whose network is the one that evaluation uses. The teacher gets the student's
    images, normalized as the student's are. A collective call; writes nothing.

    Raises InputError for a network or run that does not exist, and for one with another number of classes.
    """
    settings = recipe.distill
    if settings.teacher is None:
        return None
    if settings.teacher.partition(":")[0] in LIBRARIES:
        teacher = _from_library(settings, settings.teacher, classes, ranks)
    elif Path(settings.teacher).is_dir():
        teacher = _from_run(Path(settings.teacher), classes)
    else:
        raise InputError(f"distill.teacher = {settings.teacher!r}: no such run directory; allowed: a run directory, "
                         f"{', '.join(f'{library}:NAME' for library in LIBRARIES)}")
    return place(teacher.eval().requires_grad_(False), ranks.device, recipe.run.channels_last)


def _from_library(settings: Distill, name: str, classes: int, ranks: Ranks) -> nn.Module:
    published = settings.weights is None

    def build() -> nn.Module:
        return build_model(name, classes, pretrained=published)

    try:
        teacher = ranks.first_then_all(build) if published else build()
    except InputError as error:
        text = str(error)
        for setting, own_setting in (("model.name", "distill.teacher"), ("model.pretrained", "distill.teacher"),
                                     ("model.init_from", "distill.weights")):
            text = text.replace(setting, own_setting)
        raise InputError(text) from None
    if settings.weights is not None:
        load_weights_(teacher, settings.weights, "distill.weights")
        return teacher
    outputs = getattr(teacher, "pretrained_cfg", {}).get("num_classes", classes)  # timm replaces the last layer
    if outputs != classes:
        raise InputError(f"distill.teacher = {name!r} has {outputs} classes, the data set has {classes}")
    return teacher


def _from_run(run: Path, classes: int) -> nn.Module:
    try:
        return trained_network(read_recipe(run), checkpoint.load_chosen(run), classes)
    except InputError as error:
        raise InputError(f"distill.teacher = {str(run)!r} cannot teach {classes} classes: {error}") from None
