"""What every kind of trial shares: its settings, and the results that it reports to Tune after each epoch.

Results come from the run directory alone. A trial that starts again, because Tune retries it after a crash or because
its search is continued, first reports the epochs that it finds there: every rung needs that epoch's own score, and the
last report before a process died may never have arrived. Tune then sees an epoch twice. The scheduler identifies a
result by the trial's key and the epoch, so the second report changes nothing.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulsq.config import Recipe, load_recipe
from nulsq.files import is_locked
from nulsq.run.directory import read_metrics
from tune.space import WORST_SCORE, Search, Trial, stratum
from tune.store.directory import trial_directory

IDENTITY = ("study", "number", "key", "repeat", "stratum", "overrides")


@dataclass(frozen=True)
class TrialSettings:
    """Everything that a process needs to train one trial."""

    study: str
    number: int
    key: str
    repeat: int
    stratum: str  # trials with the same one share rungs, see `tune.space.stratum`
    overrides: dict[str, Any]  # of the recipe: the search's and the trial's own
    metric: str
    cpus: float  # of each worker
    gpus: float  # of each worker
    workers: int  # 1: tune/ray_backend/trial.py trains it; more: tune/ray_backend/workers.py
    search_directory: str  # absolute; its recipe.yaml is the recipe as it was when the search began
    working_directory: str  # relative paths in recipes start here

    @classmethod
    def of(cls, search: Search, trial: Trial, search_directory: Path) -> "TrialSettings":
        """Settings of a trial whose search was started in the current directory."""
        return cls(study=trial.study, number=trial.number, key=trial.key, repeat=trial.repeat,
                   stratum=stratum(search, trial), overrides=search.overrides | trial.overrides, metric=search.metric,
                   cpus=search.cpus, gpus=search.gpus, workers=search.workers,
                   search_directory=str(search_directory), working_directory=os.getcwd())

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TrialSettings":
        """The inverse of `to_config`."""
        return cls(**config["trial"], **{name: value for name, value in config.items() if name != "trial"})

    def to_config(self) -> dict[str, Any]:
        """The settings as the plain dict that Tune passes to a trial; its loggers record what is below `trial`."""
        config = dataclasses.asdict(self)
        return {"trial": {name: config.pop(name) for name in IDENTITY}, **config}

    @property
    def run_directory(self) -> Path:
        return trial_directory(Path(self.search_directory), self.key)

    def load_recipe(self) -> Recipe:
        """The search's recipe with the trial's overrides, run directory, threads and device."""
        run = {"run.dir": str(self.run_directory), "run.threads": max(1, int(self.cpus))}
        if not self.gpus:
            run["run.device"] = "cpu"  # Ray does not hide GPUs from a process that requested none
        return load_recipe(Path(self.search_directory) / "recipe.yaml", self.overrides | run)


def as_result(metrics: dict[str, Any], metric: str) -> dict[str, Any]:
    """An epoch's metrics as they are reported to Tune.

    Tune's searchers need numbers: a trial that diverged reports the worst score. The scheduler keeps that score out of
    the rungs.
    """
    diverged = not math.isfinite(metrics[metric])
    return {"epoch": metrics["epoch"], metric: WORST_SCORE[metric] if diverged else metrics[metric],
            "train_loss": metrics["train_loss"], "seconds": metrics.get("seconds", 0.0), "diverged": diverged}


def wait_until_free(settings: TrialSettings, seconds: float = 180.0) -> None:
    """Wait while another process trains in the trial's run directory.

    After the death of a search's driver its workers take up to a minute to notice. If the directory is still locked
    after that time, `train` raises InputError.
    """
    deadline = time.monotonic() + seconds
    while is_locked(settings.run_directory / "lock") and time.monotonic() < deadline:
        time.sleep(0.5)


def completed_results(settings: TrialSettings) -> list[dict[str, Any]]:
    """Results of the epochs that were completed before this start: those that the newest good checkpoint contains."""
    path = settings.run_directory
    if not path.is_dir():
        return []
    from nulsq.run import checkpoint  # imports torch, which only trials do

    newest = checkpoint.newest(path)
    completed = checkpoint.load(newest)["epoch"] if newest is not None else 0
    return [as_result(line, settings.metric) for line in read_metrics(path) if line["epoch"] <= completed]
