"""The trainable: override the recipe, call `nulsq.train`, hand each epoch's metrics to Ray. Runs in a Ray worker.

A trial has a run directory of its own, named by study and number. Its metrics and checkpoints are there, whatever
Ray keeps or forgets, and a trial that is started again continues from it. `tune.workers` is the same with several
processes.

With `reuse` a process that has ended a trial takes the next one: it has Python, torch and the loaders' compiled code
already. `train` leaves no thread and no setting behind, this module no memory and nothing compiled.
"""

import gc
import os
import sys
from typing import Any

import ray.tune
import torch

from nulsq.train import train
from tune.reporting import as_result, recipe_of, told_before, wait_until_free


def run(config: dict[str, Any]) -> None:
    """One trial, in one process.

    `config` holds `trial` (study, number, key, repeat, overrides), `recipe`, `metric`, `cpus`, `gpus`, `workers`, the
    search's `directory`, and the `folder` that relative paths of recipes start from.
    """
    os.chdir(config["folder"])
    recipe = recipe_of(config)
    wait_until_free(config)

    def report(metrics, checkpoint_dir=None):
        ray.tune.report(as_result(metrics, config["metric"]))

    # What was trained before an interruption is told again: the rungs have to see every epoch's own score, and the
    # report that was under way when a search was killed may never have arrived.
    for result in told_before(config):
        ray.tune.report(result)
    try:
        train(recipe, report=report, quiet=True)
    finally:  # out of `report` comes a SystemExit, where the trial is stopped
        _clear()


def _clear():
    """What the next trial in this process should not find: memory, and shapes that torch.compile has seen too many of.
    What it has compiled is on disk."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
