"""The trainable: override the recipe, call `nulsq.train`, hand each epoch's metrics to Ray. Runs in a Ray worker.

A trial has a run directory of its own, named by study and number. Its metrics and checkpoints are there, whatever
Ray keeps or forgets, and a trial that is started again continues from it. `tune.ray_backend.workers` is
the same with several processes.

With `reuse` a process that has ended a trial takes the next one: it has Python, torch and the loaders' compiled code
already. `train` leaves no thread and no setting behind. A trial that was stopped waits in `report` until then; what it
holds, memory and its run directory, is free when the next one begins.
"""

import gc
import os
import sys
from typing import Any

import ray.tune

from tune.ray_backend.trial_protocol import as_result, recipe_of, told_before, wait_until_free


def run(config: dict[str, Any]) -> None:
    """One trial, in one process.

    `config` holds `trial` (study, number, key, repeat, overrides), `recipe`, `metric`, `cpus`, `gpus`, `workers`, the
    search's `directory`, and the `folder` that relative paths of recipes start from.
    """
    from nulsq.train import train  # with torch: the search's own process, which refers to `run`, does without

    _clear()
    os.chdir(config["folder"])
    recipe = recipe_of(config)
    wait_until_free(config)

    def report(metrics, checkpoint_dir=None):
        ray.tune.report(as_result(metrics, config["metric"]))

    # What was trained before an interruption is told again: the rungs have to see every epoch's own score, and the
    # report that was under way when a search was killed may never have arrived.
    for result in told_before(config):
        ray.tune.report(result)
    train(recipe, report=report, quiet=True)


def _clear():
    """What the trial before may have left in this process: memory, and shapes that torch.compile has seen too many of.
    What it has compiled is on disk."""
    import torch

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class TakesOver:
    """Part of the class that Tune makes of `run`."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Raises RuntimeError where the trial before does not end: Tune tells nobody of a False."""
        if not super().reset_config(new_config):
            raise RuntimeError("the process that was to take this trial over is still ending the one before, after "
                               f"{os.environ.get('TUNE_FUNCTION_THREAD_TIMEOUT_S')} s")
        return True


run.__mixins__ = (TakesOver,)
