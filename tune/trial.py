"""The trainable: override the recipe, call `nulsq.train`, hand each epoch's metrics to Ray. Runs in a Ray worker.

A trial has a run directory of its own, named by study and number. Its metrics and checkpoints are there, whatever
Ray keeps or forgets, and a trial that is started again continues from it.
"""

import math
import os
from pathlib import Path
from typing import Any

import ray.tune

from nulsq.config import load_recipe
from nulsq.train import train

WORST = {"val_top1": 0.0, "val_loss": 1e9}


def run(config: dict[str, Any]) -> None:
    """One trial, in a process of its own.

    `config` holds `trial` (study, number, overrides), `recipe`, `metric`, `cpus`, the search's `directory`, and the
    `folder` that relative paths of recipes start from.
    """
    os.chdir(config["folder"])
    trial = config["trial"]
    own = {"run.dir": str(directory(Path(config["directory"]), trial["study"], trial["number"])),
           "run.threads": max(1, int(config["cpus"]))}
    recipe = load_recipe(config["recipe"], trial["overrides"] | own)

    def report(metrics, checkpoint_dir):
        score = metrics[config["metric"]]
        if not (math.isfinite(metrics["train_loss"]) and math.isfinite(score)):
            score = WORST[config["metric"]]
        ray.tune.report({"epoch": metrics["epoch"], config["metric"]: score, "train_loss": metrics["train_loss"]})

    train(recipe, report=report, quiet=True)


def directory(search: Path, study: str, number: int) -> Path:
    """The run directory of a trial."""
    return search / "trials" / study / f"{number:03d}"
