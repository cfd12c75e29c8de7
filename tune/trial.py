"""The trainable: override the recipe, call `nulsq.train`, hand each epoch's metrics to Ray. Runs in a Ray worker.

A trial has a run directory of its own, named by study and number. Its metrics and checkpoints are there, whatever
Ray keeps or forgets, and a trial that is started again continues from it.
"""

import os
from pathlib import Path
from typing import Any

import ray.tune

from nulsq import checkpoint
from nulsq.config import load_recipe
from nulsq.run_directory import read_metrics
from nulsq.train import train
from tune.space import trial_key


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
        # A score that is no number is reported as it is: the scheduler ends the trial and keeps it out of the rungs.
        ray.tune.report({"epoch": metrics["epoch"], metric: metrics[metric], "train_loss": metrics["train_loss"]})

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
