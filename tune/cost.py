"""What a trial's network costs, before it is trained: bits and bytes follow from the recipe alone.

    average_bits   mean of the average weight bits and the average activation bits (see nulsq.inspect.cost)
    bytes          packed weights, other parameters and what the quantizers keep
"""

import torch

from nulsq.config import Recipe
from nulsq.data import DataSet
from nulsq.inspect.cost import cost_of
from nulsq.models import network
from nulsq.quant.calibrate import calibrate_
from nulsq.quant.step import quantizers_of


def network_cost(recipe: Recipe) -> dict[str, float]:
    """{"average_bits", "bytes"} of the recipe's network. One pass of one image; recipes of the same network and bits
    share it."""
    data = DataSet(recipe.data.path)
    size = data.manifest.size or recipe.data.eval_size or recipe.data.size
    same = repr((recipe.model, recipe.quant, len(data.classes), size))
    if same not in _KNOWN:
        _KNOWN[same] = _cost(recipe, len(data.classes), size)
    return dict(_KNOWN[same])


_KNOWN: dict[str, dict[str, float]] = {}


def _cost(recipe, classes, size):
    model = network(recipe, classes, start=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(2, 3, size, size)
    if quantizers_of(model):
        calibrate_(model, [images])  # values do not matter here: shapes and bits are counted
    found = cost_of(model, images[:1])
    return {"average_bits": round((found.average_weight_bits + found.average_activation_bits) / 2, 3),
            "bytes": found.bytes}
