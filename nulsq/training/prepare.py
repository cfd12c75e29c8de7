"""What has to be right before a run writes anything: settings, data, network, starting weights, quantizers, teacher."""

from dataclasses import dataclass

from torch import nn

from nulsq.config import Recipe, check_recipe
from nulsq.data import DataSet, check_data
from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.models.libraries import build_model
from nulsq.models.network import build_network, track_oscillations
from nulsq.models.teacher import build_teacher
from nulsq.quant.batch_norm import batch_norms


@dataclass
class Prepared:
    """What a recipe trains: checked, in memory, nothing written."""

    data: DataSet
    loader_name: str  # device, ffcv or torchvision
    model: nn.Module  # with starting weights and quantizers, not calibrated
    teacher: nn.Module | None


def prepare(recipe: Recipe, ranks: Ranks, *, start: bool = True) -> Prepared:
    """Open the data, build the network with its starting weights and quantizers, and its teacher. Writes nothing.

    With `start=False` no starting weights are read: a checkpoint has them. Raises InputError for a recipe that cannot
    be run on these ranks.
    """
    check_recipe(recipe)
    data = DataSet(recipe.data.path)
    classes = len(data.classes)
    loader_name = check_data(recipe.data, data, ranks.size, ranks.device)
    if recipe.data.batch % (recipe.optim.accumulate * ranks.size):
        raise InputError(f"data.batch = {recipe.data.batch} does not divide over {ranks.size} ranks and "
                         f"optim.accumulate = {recipe.optim.accumulate}")
    if recipe.model.pretrained and recipe.model.init_from:
        raise InputError("model.pretrained and model.init_from are both set; choose one")
    if recipe.quant.calibration == "reference" and ranks.size > 1:
        raise InputError("quant.calibration = reference is the authors' protocol for one process; it is not defined "
                         f"for {ranks.size} ranks")
    if recipe.model.pretrained and start:
        ranks.first_then_all(lambda: build_model(recipe.model.name, classes, pretrained=True))
    model = build_network(recipe, classes, start=start, batch_shards=ranks.size * recipe.optim.accumulate)
    track_oscillations(recipe, model)  # raises where there is nothing to track; calibration sets the levels later
    if recipe.optim.reestimate_bn and not batch_norms(model):
        raise InputError(f"optim.reestimate_bn = {recipe.optim.reestimate_bn}: {recipe.model.name} has no batch norm")
    return Prepared(data, loader_name, model, build_teacher(recipe, classes, ranks))
