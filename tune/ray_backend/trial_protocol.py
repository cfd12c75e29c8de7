"""What every form of a trial shares: its recipe, and what it tells Tune after an epoch.

A search's config of a trial holds `trial` (study, number, key, overrides), `recipe`, `metric`, `cpus` and `gpus` (of
each process), the search's `directory`, and the `folder` that relative paths of recipes start from. With `workers`
above 1, several processes train it together (tune/ray_backend/workers.py), else one does (tune/ray_backend/trial.py).

What Tune is told comes from the run directory alone. A trial that is started again, by Tune after a crash or by a
search that is continued, first tells the epochs that it finds there: the rungs have to see every epoch's own score, and
the report that was under way when a process died may never have arrived. Tune sees an epoch twice then; the scheduler
knows trials by key and epoch, and the second time changes nothing.
"""

import math
import time
from pathlib import Path
from typing import Any

from nulsq.config import load_recipe
from nulsq.files import is_locked
from nulsq.run.directory import read_metrics

WORST = {"val_top1": 0.0, "val_loss": 1e9}  # the score of a trial that diverged


def directory(search: Path, key: str) -> Path:
    """The run directory of a trial, in the search's folder."""
    return search / "trials" / key


def run_directory(config: dict[str, Any]) -> Path:
    """The same, of the trial that this process has."""
    return directory(Path(config["directory"]), config["trial"]["key"])


def recipe_of(config: dict[str, Any]):
    """The trial's recipe: the search's, the trial's overrides, and what is a trial's own."""
    own = {"run.dir": str(run_directory(config)), "run.threads": max(1, int(config["cpus"]))}
    if not config["gpus"]:
        own["run.device"] = "cpu"  # Ray hides no GPU from a process that asked for none
    return load_recipe(config["recipe"], config["trial"]["overrides"] | own)


def as_result(metrics: dict[str, Any], metric: str) -> dict[str, Any]:
    """An epoch's metrics as Tune gets them.

    Searchers need numbers: a trial that diverged has the worst. The scheduler keeps it out of the rungs.
    """
    diverged = not math.isfinite(metrics[metric])
    return {"epoch": metrics["epoch"], metric: WORST[metric] if diverged else metrics[metric],
            "train_loss": metrics["train_loss"], "seconds": metrics.get("seconds", 0.0), "diverged": diverged}


def wait_until_free(config: dict[str, Any], seconds: float = 180.0) -> None:
    """Wait while another process trains in this run directory: after the death of a search's driver its workers take
    up to a minute to notice. Whoever still holds it then is an error of `train`'s."""
    file = run_directory(config) / "lock"
    deadline = time.monotonic() + seconds
    while is_locked(file) and time.monotonic() < deadline:
        time.sleep(0.5)


def told_before(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of the epochs that were done before this start: those that the newest good checkpoint holds."""
    path = run_directory(config)
    if not path.is_dir():
        return []
    from nulsq import checkpoint  # with torch, which only a trial has

    newest = checkpoint.newest(path)
    done = checkpoint.load(newest)["epoch"] if newest is not None else 0
    return [as_result(line, config["metric"]) for line in read_metrics(path) if line["epoch"] <= done]
