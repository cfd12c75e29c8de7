"""What a trial's network costs, before it is trained: bits and bytes follow from the recipe alone.

    average_bits   mean of the average weight bits and the average activation bits (see nulsq.inspect.cost)
    bytes          packed weights, other parameters and what the quantizers keep
"""

import dataclasses
import functools

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
    model = dataclasses.replace(recipe.model, init_from=None, pretrained=False)
    return dict(_cost(_Key(dataclasses.replace(recipe, model=model)), len(data.classes), size))


class _Key:
    """A recipe that stands for all with the same network and quantizers."""

    def __init__(self, recipe):
        self.recipe = recipe

    def __hash__(self):
        return hash(repr((self.recipe.model, self.recipe.quant)))

    def __eq__(self, other):
        return repr((self.recipe.model, self.recipe.quant)) == repr((other.recipe.model, other.recipe.quant))


@functools.lru_cache(maxsize=256)
def _cost(key, classes, size):
    model = network(key.recipe, classes, start=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(2, 3, size, size)
    if quantizers_of(model):
        calibrate_(model, [images])  # values do not matter here: shapes and bits are counted
    found = cost_of(model, images[:1])
    return {"average_bits": round((found.average_weight_bits + found.average_activation_bits) / 2, 3),
            "bytes": found.bytes}
