"""What has to be right before a run may write anything: settings, data, network, starting weights, quantizers."""

import torch
from torch import nn

from nulsq.config import Recipe, check_recipe
from nulsq.data import DataSet, check_data
from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.models.libraries import build_model
from nulsq.models.network import build_network
from nulsq.quant.batch_norm import batch_norms
from nulsq.training.state import track_oscillations


def prepare(recipe: Recipe, ranks: Ranks, *, start: bool = True) -> tuple[DataSet, nn.Module, str]:
    """Open the data, build the network with its starting weights and quantizers. Raises InputError; writes nothing.

    With `start=False` no weights are read: a checkpoint has them.
    """
    check_recipe(recipe)
    data = DataSet(recipe.data.path)
    kind = check_data(recipe.data, data, ranks.size, ranks.device)
    if recipe.data.batch % (recipe.optim.accumulate * ranks.size):
        raise InputError(f"data.batch = {recipe.data.batch} does not divide over {ranks.size} ranks and "
                         f"optim.accumulate = {recipe.optim.accumulate}")
    if recipe.model.pretrained and recipe.model.init_from:
        raise InputError("model.pretrained and model.init_from are both set; choose one")
    if recipe.quant.calibration == "reference" and ranks.size > 1:
        raise InputError("quant.calibration = reference is the authors' protocol of one process; it has no meaning for "
                         f"{ranks.size} ranks")
    if recipe.model.pretrained and start and torch.distributed.is_initialized():
        # one rank downloads, the others find the file
        ranks.on_first(lambda: build_model(recipe.model.name, len(data.classes), pretrained=True) and None)
    model = build_network(recipe, len(data.classes), start=start, batch_shards=ranks.size * recipe.optim.accumulate)
    track_oscillations(recipe, model)  # whether there is something to track; from which levels on, calibration says
    if recipe.optim.reestimate_bn and not batch_norms(model):
        raise InputError(f"optim.reestimate_bn = {recipe.optim.reestimate_bn}: {recipe.model.name} has no batch norm")
    return data, model, kind
