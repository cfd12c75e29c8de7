"""Checks of a search before it starts: build each study's network, open its data, and measure what networks cost.

Everything here needs torch, which is imported inside the functions: `tune.search` imports this module, but calls
`check` in a subprocess, so that its own process does not hold torch (see `tune.subprocess_call`).
"""

import os

from nulsq.config import Recipe
from tune.ray_backend.cluster import fits
from tune.space import Search, base_recipe, studies


class NetworkCosts:
    """Costs of trials' networks. They depend on the recipe alone, not on training:

        average_bits   mean of the average weight bits and the average activation bits (see nulsq.cost)
        bytes          packed weights, other parameters and the state of the quantizers
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, float]] = {}

    def of(self, recipe: Recipe) -> dict[str, float]:
        """{"average_bits": ..., "bytes": ...} of the recipe's network.

        Measured once for all recipes with the same network, quantizers and image size. Measuring loads torch into this
        process; `check` has measured all networks of a search unless its space has settings of the network.
        """
        key = repr((recipe.model, recipe.quant, recipe.data.path, recipe.data.size, recipe.data.eval_size))
        if key not in self._known:
            self._known[key] = network_cost(recipe)
        return dict(self._known[key])


def network_cost(recipe: Recipe) -> dict[str, float]:
    """Measure the costs of a recipe's network, see `NetworkCosts`: one pass of one image."""
    import torch

    from nulsq.cost import cost_of
    from nulsq.data import DataSet
    from nulsq.models.network import build_network
    from nulsq.quant.calibration.calibrate import calibrate_
    from nulsq.quant.projection import quantizers_of

    data = DataSet(recipe.data.path)
    size = data.manifest.size or recipe.data.eval_size or recipe.data.size
    model = build_network(recipe, len(data.classes), start=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(2, 3, size, size)
    if quantizers_of(model):
        calibrate_(model, [images])  # only shapes and bits are counted, any images do
    cost = cost_of(model, images[:1])
    return {"average_bits": round((cost.average_weight_bits + cost.average_activation_bits) / 2, 3),
            "bytes": cost.bytes}


def check(search: Search, measure: bool = True) -> tuple[int, NetworkCosts]:
    """Check a search; return the number of GPUs of this machine and, with `measure`, the costs of each study's network.

    Raises InputError for what cannot be trained, or not on this machine where the search is to run on it.
    """
    import torch

    gpus = torch.cuda.device_count()
    if search.address == "local":  # the resources of a cluster are known on its nodes only
        fits([(len(os.sched_getaffinity(0)), gpus)], search.cpus, search.gpus, search.workers)
    check_recipes(search)
    costs = NetworkCosts()
    if measure:
        for study in studies(search):
            costs.of(base_recipe(search, study.overrides))
    return gpus, costs


def check_recipes(search: Search) -> None:
    """Build each study's network and open its data. Raises InputError for what cannot be trained."""
    import torch

    from nulsq.distributed import Ranks
    from nulsq.training.prepare import prepare

    ranks = Ranks(0, search.workers, torch.device("cpu"))
    for study in studies(search):
        prepare(base_recipe(search, study.overrides), ranks)
