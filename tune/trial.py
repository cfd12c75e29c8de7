"""The trainable: override the recipe, call `nulsq.train`, hand each epoch's metrics to Ray. Runs in a Ray worker.

A trial has a run directory of its own, named by study and number. Its metrics and checkpoints are there, whatever
Ray keeps or forgets, and a trial that is started again continues from it.
"""

import math
import os
from pathlib import Path
from typing import Any

import ray.tune

from nulsq import checkpoint
from nulsq.config import load_recipe
from nulsq.run_directory import read_metrics
from nulsq.train import train
from tune.space import trial_key

WORST = {"val_top1": 0.0, "val_loss": 1e9}


def run(config: dict[str, Any]) -> None:
    """One trial, in a process of its own.

    `config` holds `trial` (study, number, overrides), `recipe`, `metric`, `cpus`, `gpus`, the search's `directory`,
    and the `folder` that relative paths of recipes start from.
    """
    os.chdir(config["folder"])
    trial, metric = config["trial"], config["metric"]
    path = directory(Path(config["directory"]), trial["study"], trial["number"])
    own = {"run.dir": str(path), "run.threads": max(1, int(config["cpus"]))}
    if not config["gpus"]:
        own["run.device"] = "cpu"  # Ray hides no GPU from a trial that asked for none
    recipe = load_recipe(config["recipe"], trial["overrides"] | own)

    def report(metrics, checkpoint_dir=None):
        # Searchers need numbers: a trial that diverged has the worst. The scheduler keeps it out of the rungs.
        diverged = not math.isfinite(metrics[metric])
        ray.tune.report({"epoch": metrics["epoch"], metric: WORST[metric] if diverged else metrics[metric],
                         "train_loss": metrics["train_loss"], "diverged": diverged})

    # What was trained before an interruption is told again: the rungs have to see every epoch's own score, and the
    # report that was under way when a search was killed may never have arrived.
    newest = checkpoint.newest(path)
    if newest is not None:
        done = checkpoint.load(newest)["epoch"]
        for metrics in read_metrics(path):
            if metrics["epoch"] <= done:
                report(metrics)
    train(recipe, report=report, quiet=True)


def directory(search: Path, study: str, number: int) -> Path:
    """The run directory of a trial."""
    return search / "trials" / trial_key(study, number)
