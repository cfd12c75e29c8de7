"""What is checked of a search before it starts: each study's network is built and its data opened.

This needs torch: `tune.search` calls it through `tune.apart`.
"""

import os

import torch

from nulsq.distributed import Ranks
from nulsq.training.prepare import prepare
from tune.cost import KNOWN, network_cost
from tune.ray_backend.cluster import fits
from tune.space import Search, base_recipe, studies


def check(search: Search, measure: bool = True) -> tuple[int, dict[str, dict[str, float]]]:
    """GPUs of this machine, and the costs of the studies' networks as `tune.cost` keeps them, where they are wanted.

    Nothing of torch or of this module in what is returned: whoever reads it would import that.

    Raises InputError for what cannot be trained, or not on this machine where the search is to run on it.
    """
    gpus = torch.cuda.device_count()
    if search.address == "local":  # of a cluster only its nodes know
        fits([(len(os.sched_getaffinity(0)), gpus)], search.cpus, search.gpus, search.workers)
    check_recipes(search)
    if measure:
        for study in studies(search):
            network_cost(base_recipe(search, study.overrides))
    return gpus, dict(KNOWN)


def check_recipes(search: Search) -> None:
    """Build each study's network and open its data. Raises InputError for what cannot be trained."""
    ranks = Ranks(0, search.workers, torch.device("cpu"))
    for study in studies(search):
        recipe = base_recipe(search, study.overrides)
        prepare(recipe, ranks)
