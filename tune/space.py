"""A search in YAML: a grid of studies, and a space that every study's trials are sampled from.

    recipe: configs/recipes/digits/w2a2.yaml
    studies:                                        # the grid: each cell is a study with its own ASHA
      bits: {key: quant.bits, values: [2, 4]}
    space:                                          # sampled for every trial
      lr: {key: optim.lr, sample: loguniform, low: 0.005, high: 0.1}
    points:                                         # tried first in every study
      published: {lr: 0.04}
    trials: 8                                       # per study

Axes, samplers and points have names, because a command line such as `space.lr.high=0.2` cannot contain recipe keys.
A search file may build on another one: `base: OTHER.yaml` takes its settings, except `name`.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nulsq.config import Recipe, load, load_recipe, setting
from nulsq.errors import InputError

WORST_SCORE = {"val_top1": 0.0, "val_loss": 1e9}  # by metric: the score of a trial that diverged
STRATUM = "~"  # separates a study's name from the cost of a stratum


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid of studies."""

    key: str = setting("", "dotted recipe key")
    values: list[Any] = setting(list, "one study for each")
    cases: dict[str, dict[str, Any]] = setting(dict, "instead of key and values, where a case needs several keys: "
                                               "NAME: {dotted recipe key: value}")

    @property
    def options(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and settings of each study along this axis."""
        return list(self.cases.items()) or [(str(value), {self.key: value}) for value in self.values]

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for _, settings in self.options for key in settings))


@dataclass(frozen=True)
class Sampler:
    """One dimension of the sampled space."""

    key: str = setting("", "dotted recipe key")
    sample: Literal["loguniform", "uniform", "choice"] = setting("loguniform", "distribution")
    low: float | None = setting(None, "lower end of loguniform and uniform")
    high: float | None = setting(None, "upper end of loguniform and uniform")
    values: list[Any] = setting(list, "values of choice")

    def quantile(self, u: float) -> Any:
        """The value at quantile u in [0, 1)."""
        if self.sample == "choice":
            return self.values[int(u * len(self.values))]
        low, high = self.bounds
        if self.sample == "uniform":
            return low + u * (high - low)
        return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))

    def holds(self, value: Any) -> bool:
        """Whether `value` could be sampled."""
        if self.sample == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.bounds[0] <= value <= self.bounds[1]

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of loguniform and uniform; `load_search` checks that they are set."""
        assert self.low is not None and self.high is not None
        return self.low, self.high

    def ends(self) -> list[Any]:
        """All values of a choice, else the lower and the upper end."""
        return self.values if self.sample == "choice" else list(self.bounds)


@dataclass(frozen=True)
class Search:
    """All settings of a search."""

    name: str | None = setting(None, "default: the file's name")
    recipe: str = setting("", "recipe that every trial starts from")
    overrides: dict[str, Any] = setting(dict, "dotted recipe keys that every trial has")
    studies: dict[str, Axis] = setting(dict, "the grid: NAME: {key, values}")
    space: dict[str, Sampler] = setting(dict, "the sampled space: NAME: {key, sample, low, high | values}")
    searcher: Literal["random", "quasirandom", "tpe"] = setting(
        "random", "how to sample hyperparameters; quasirandom: a scrambled Sobol sequence; tpe: Optuna's, which learns "
        "from results")
    points: dict[str, dict[str, Any]] = setting(dict, "tried first in every study: NAME: {sampler's name: value}")
    warm_start: str | None = setting(None, "folder of another search: the best hyperparameters of its study of the "
                                     "same name are tried first; tpe learns from all trials of that study")
    warm_best: int = setting(3, "how many of them are tried first", low=1)
    trials: int = setting(8, "trials per study", low=1)
    grace: int = setting(1, "epochs that every trial gets: ASHA's first rung", low=1)
    reduction: int = setting(3, "at a rung, 1 of this many trials continues", low=2)
    metric: Literal["val_top1", "val_loss"] = setting("val_top1", "what trials are ranked by, on the holdout")
    against: Literal["none", "average_bits", "bytes"] = setting(
        "none", "second objective, for a space that changes it: tpe searches the Pareto front, and only trials of "
        "about the same cost are compared at rungs")
    finalists: int = setting(1, "the best trials of each study, which are trained again with other seeds", low=1)
    repeats: int = setting(0, "how often each finalist is trained again", low=0)
    seed: int = setting(0, "seed of the sampled hyperparameters", low=0)
    workers: int = setting(1, "processes of a trial (DDP)", low=1)
    cpus: float = setting(1, "CPU cores of a process", above=0)
    gpus: float = setting(0, "GPUs of a process; fractions are allowed with one process", low=0)
    concurrent: int | None = setting(None, "trials at once; default: as many as the cores and GPUs allow", low=1)
    reuse: bool = setting(True, "with one process per trial, a process that has ended a trial takes the next one, "
                          "which then starts in a second; false: a new process for each trial")
    retries: int = setting(1, "how often a crashed trial is started again", low=0)
    hours: float | None = setting(None, "time budget; when it is used up, the search stops and shows its results so "
                                  "far; with more hours it continues", above=0)
    address: str = setting("local", "local: start Ray on this machine; auto or HOST:PORT: join a running cluster")
    nodes: int = setting(1, "trials start once the cluster at `address` has this many nodes", low=1)
    patience: float = setting(300, "seconds to wait for these nodes", low=0)
    wandb: str | None = setting(None, "Weights & Biases project that trials are logged to")
    mlflow: str | None = setting(None, "MLflow tracking URI that trials are logged to")
    dir: str | None = setting(None, "search directory; default: runs/search-NAME")

    @property
    def directory(self) -> Path:
        return Path(self.dir or f"runs/search-{self.name}")

    @property
    def mode(self) -> str:
        return "min" if self.metric.endswith("loss") else "max"


@dataclass(frozen=True)
class Study:
    """One cell of the grid."""

    name: str
    overrides: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A recipe of a study, with sampled hyperparameters."""

    study: str
    number: int
    overrides: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)  # the sampled hyperparameters: sampler's name -> value
    source: str = "random"  # of the hyperparameters: point, warm, random, quasirandom, tpe or repeat
    repeat: int = 0  # 1, 2, ...: a finalist that is trained again with another seed
    cost: dict[str, float] = field(default_factory=dict)  # average_bits and bytes of its network

    @property
    def key(self) -> str:
        """STUDY/NUMBER or STUDY/NUMBER-rREPEAT: identifies the trial in the rungs, names its folder in trials/."""
        return f"{self.study}/{self.number:03d}" + (f"-r{self.repeat}" if self.repeat else "")


def stratum(search: Search, trial: Trial) -> str:
    """The group of trials that a trial is compared with at rungs: those of its study.

    With two objectives only those of about the same cost, to half a bit of average bits or half an octave of bytes.
    """
    if search.against == "none":
        return trial.study
    cost = trial.cost[search.against]
    step = cost if search.against == "average_bits" else math.log2(cost)
    return f"{trial.study}{STRATUM}{round(2 * step) / 2:g}"


def load_search(path: str | Path, overrides: Iterable[str] = ()) -> Search:
    """Read and check a search file. Raises InputError for settings that cannot work, before Ray is started."""
    search = load(Search, path, overrides)
    name = search.name or Path(path).stem
    if STRATUM in name or "/" in name:
        raise InputError(f"name = {name}: folders and studies are named after it, without {STRATUM} and /")
    search = dataclasses.replace(search, name=name)
    if not search.recipe:
        raise InputError(f"{path}: recipe is missing")
    if search.nodes > 1 and search.address == "local":
        raise InputError(f"nodes = {search.nodes}, allowed with address = local: 1, a local Ray is one node; auto or "
                         "HOST:PORT joins a cluster")
    for name, sampler in search.space.items():
        _check_sampler(f"space.{name}", sampler)
    for name, axis in search.studies.items():
        if bool(axis.key and axis.values) == bool(axis.cases):
            raise InputError(f"studies.{name} needs a key and values, as in {{key: quant.bits, values: [2, 4]}}, or "
                             "cases, as in {cases: {both: {quant.weight.quantizer: lsq, quant.bits: 4}}}")
    _check_keys(path, search)
    for name, point in search.points.items():
        _check_point(f"points.{name}", point, search)
    names = [study.name for study in studies(search)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"studies: two studies would be called {twice}; give each axis distinct values")
    epochs = full_epochs(search)
    if max(epochs.values()) < search.grace:
        raise InputError(f"grace = {search.grace}, but a trial has only {max(epochs.values())} epochs (optim.epochs)")
    first = studies(search)[0].overrides  # the allowed values of a setting do not depend on the study
    for name, sampler in search.space.items():
        for end in sampler.ends():
            try:
                base_recipe(search, first | {sampler.key: end})
            except InputError as error:
                raise InputError(f"space.{name}: {error}") from None
    for study in studies(search):
        if base_recipe(search, study.overrides).data.holdout == "none":
            raise InputError("data.holdout = none: a search ranks trials on the holdout, so it needs one")
    return search


def base_recipe(search: Search, overrides: dict[str, Any]) -> Recipe:
    """The search's recipe with further settings."""
    return _recipe(search.recipe, json.dumps(search.overrides | overrides))


@functools.lru_cache(maxsize=4096)
def _recipe(path: str, overrides: str) -> Recipe:
    return load_recipe(path, json.loads(overrides))


def studies(search: Search) -> list[Study]:
    """The cells of the grid, in order."""
    if not search.studies:
        return [Study(search.name or "study", {})]
    cells = []
    for options in itertools.product(*(axis.options for axis in search.studies.values())):
        name = "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in name) for name, _ in options)
        cells.append(Study(name, {key: value for _, settings in options for key, value in settings.items()}))
    return cells


def full_epochs(search: Search) -> dict[str, int]:
    """Study -> epochs of its full schedule."""
    return {study.name: base_recipe(search, study.overrides).optim.epochs for study in studies(search)}


def rungs(epochs: int, grace: int, reduction: int) -> list[int]:
    """Epochs at which trials are compared: grace * reduction^k below the last epoch."""
    milestones = []
    while grace < epochs:
        milestones.append(grace)
        grace *= reduction
    return milestones


def expected_epochs(search: Search, epochs: int) -> float:
    """Epochs that a study's trials take with synchronous halving; asynchronous halving promotes somewhat more."""
    spent, before, alive = 0.0, 0, float(search.trials)
    for step in [*rungs(epochs, search.grace, search.reduction), epochs]:
        spent += max(1, alive) * (step - before)
        before, alive = step, alive / search.reduction
    return spent


def _check_keys(path: str | Path, search: Search) -> None:
    keys = [*(key for axis in search.studies.values() for key in axis.keys),
            *(sampler.key for sampler in search.space.values()), *search.overrides]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise InputError(f"{path}: {twice[0]} is set by two entries of studies, space and overrides")
    if run_keys := [key for key in keys if key.startswith("run.") and key != "run.seed"]:
        raise InputError(f"{path}: {run_keys[0]} is set for each trial and cannot be searched or overridden")
    for name, sampler in search.space.items():
        if sampler.key in ("optim.epochs", "data.holdout", "data.holdout_seed"):
            raise InputError(f"space.{name}: {sampler.key} cannot be sampled, because it must be equal in all trials "
                             "of a study; make it an axis of studies")


def _check_sampler(where: str, sampler: Sampler) -> None:
    if not sampler.key:
        raise InputError(f"{where}.key is missing: the dotted recipe key that is sampled, such as optim.lr")
    if sampler.sample == "choice":
        if not sampler.values:
            raise InputError(f"{where}.values is empty; sample: choice needs values")
        return
    if sampler.low is None or sampler.high is None or not sampler.low < sampler.high:
        raise InputError(f"{where}: low = {sampler.low}, high = {sampler.high}; {sampler.sample} needs low < high")
    if sampler.sample == "loguniform" and not sampler.low > 0:
        raise InputError(f"{where}.low = {sampler.low}, allowed for loguniform: above 0")


def _check_point(where: str, point: dict[str, Any], search: Search) -> None:
    unknown = sorted(set(point) - set(search.space))
    missing = sorted(set(search.space) - set(point))
    if unknown or missing:
        wrong = f"{unknown[0]} is no sampler" if unknown else f"{missing[0]} is missing"
        raise InputError(f"{where}: {wrong}; a point has a value for each of {', '.join(search.space) or 'none'}")
    for name, value in point.items():
        if not search.space[name].holds(value):
            ends = search.space[name].ends()
            allowed = f"one of {ends}" if search.space[name].sample == "choice" else f"{ends[0]:g} to {ends[1]:g}"
            raise InputError(f"{where}.{name} = {value}, allowed: {allowed}, the range of space.{name}")
