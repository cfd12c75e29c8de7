"""A search in YAML: a grid of studies, and a space that every study's trials are drawn from.

    recipe: configs/recipes/digits/w2a2.yaml
    studies:                                        # the grid: each cell is a study with its own ASHA
      bits: {key: quant.bits, values: [2, 4]}
    space:                                          # drawn anew for every trial
      lr: {key: optim.lr, sample: loguniform, low: 0.005, high: 0.1}
    trials: 8                                       # per study

Axes and samplers have names, so that a command line can say `space.lr.high=0.2` (recipe keys have dots in them).
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nulsq.config import Recipe, load, load_recipe, setting
from nulsq.errors import InputError


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid of studies."""

    key: str = setting("", "dotted recipe key")
    values: list[Any] = setting(list, "a study for each")


@dataclass(frozen=True)
class Sampler:
    """One dimension of the sampled space."""

    key: str = setting("", "dotted recipe key")
    sample: Literal["loguniform", "uniform", "choice"] = setting("loguniform", "distribution")
    low: float | None = setting(None, "of loguniform and uniform")
    high: float | None = setting(None, "of loguniform and uniform")
    values: list[Any] = setting(list, "of choice")

    def draw(self, u: float) -> Any:
        """The value at quantile u in [0, 1)."""
        if self.sample == "choice":
            return self.values[int(u * len(self.values))]
        if self.sample == "uniform":
            return self.low + u * (self.high - self.low)
        return math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))

    def ends(self) -> list[Any]:
        return self.values if self.sample == "choice" else [self.low, self.high]


@dataclass(frozen=True)
class Search:
    """Everything that one search needs."""

    name: str | None = setting(None, "default: the file's name")
    recipe: str = setting("", "recipe that every trial starts from")
    overrides: dict[str, Any] = setting(dict, "dotted recipe keys that every trial has")
    studies: dict[str, Axis] = setting(dict, "the grid: NAME: {key, values}")
    space: dict[str, Sampler] = setting(dict, "the sampled space: NAME: {key, sample, low, high | values}")
    trials: int = setting(8, "trials per study", low=1)
    grace: int = setting(1, "epochs that every trial gets: ASHA's first rung", low=1)
    reduction: int = setting(3, "1 of so many trials goes on at a rung", low=2)
    metric: Literal["val_top1", "val_loss"] = setting("val_top1", "what trials are ranked by, on the holdout")
    seed: int = setting(0, "of the drawn hyperparameters", low=0)
    cpus: float = setting(1, "CPU cores of a trial", above=0)
    gpus: float = setting(0, "GPUs of a trial, fractions allowed", low=0)
    concurrent: int | None = setting(None, "trials at once; default: as many as the cores and GPUs allow", low=1)
    retries: int = setting(1, "times that a crashed trial is started again", low=0)
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
    """One drawn recipe of a study."""

    study: str
    number: int
    overrides: dict[str, Any] = field(default_factory=dict)
    drawn: dict[str, Any] = field(default_factory=dict)  # sampler name -> value

    @property
    def key(self) -> str:
        return trial_key(self.study, self.number)


def trial_key(study: str, number: int) -> str:
    """STUDY/NUMBER: what a trial is called in the rungs, and its folder below the search's trials/."""
    return f"{study}/{number:03d}"


def load_search(path: str | Path, overrides: Iterable[str] = ()) -> Search:
    """Read and check a search file. Raises InputError for whatever cannot work, before Ray is started."""
    search = load(Search, path, overrides)
    if not search.name:
        search = dataclasses.replace(search, name=Path(path).stem)
    if not search.recipe:
        raise InputError(f"{path}: recipe is missing")
    for name, sampler in search.space.items():
        _check_sampler(f"space.{name}", sampler)
    for name, axis in search.studies.items():
        if not axis.key or not axis.values:
            raise InputError(f"studies.{name} needs a key and values, as in {{key: quant.bits, values: [2, 4]}}")
    _check_keys(path, search)
    names = [study.name for study in studies(search)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"studies: two studies would be called {twice}; give each axis distinct values")
    epochs = {study.name: base_recipe(search, study.overrides).optim.epochs for study in studies(search)}
    if max(epochs.values()) < search.grace:
        raise InputError(f"grace = {search.grace}, but a trial has only {max(epochs.values())} epochs (optim.epochs)")
    for study in studies(search):
        for name, sampler in search.space.items():
            for end in sampler.ends():
                try:
                    base_recipe(search, study.overrides | {sampler.key: end})
                except InputError as error:
                    raise InputError(f"space.{name}: {error}") from None
        if base_recipe(search, study.overrides).data.holdout == "none":
            raise InputError("data.holdout = none: a search ranks trials on the holdout, it needs one")
    return search


def base_recipe(search: Search, overrides: dict[str, Any]) -> Recipe:
    return load_recipe(search.recipe, search.overrides | overrides)


def studies(search: Search) -> list[Study]:
    """The cells of the grid, in order."""
    axes = list(search.studies.values())
    if not axes:
        return [Study(search.name or "study", {})]
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        name = "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in str(value)) for value in values)
        found.append(Study(name, {axis.key: value for axis, value in zip(axes, values, strict=True)}))
    return found


def trials(search: Search) -> list[Trial]:
    """All trials in the order in which they start: studies take turns, so each gets its share from the first minute.

    Trial n of every study has the same draw: studies are compared on the same hyperparameters. A draw depends on
    (seed, n, sampler's name) alone, so more trials or another sampler leave the others as they were.
    """
    found = []
    for number in range(search.trials):
        drawn = {name: sampler.draw(_uniform(search.seed, number, name)) for name, sampler in search.space.items()}
        sampled = {search.space[name].key: value for name, value in drawn.items()}
        found += [Trial(study.name, number, study.overrides | sampled, drawn) for study in studies(search)]
    return found


def rungs(epochs: int, grace: int, reduction: int) -> list[int]:
    """Epochs at which trials are compared: grace * reduction^k below the last epoch."""
    found = []
    while grace < epochs:
        found.append(grace)
        grace *= reduction
    return found


def _check_keys(path, search):
    keys = [*(part.key for part in (*search.studies.values(), *search.space.values())), *search.overrides]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise InputError(f"{path}: {twice[0]} is set by two entries of studies, space and overrides")
    own = [key for key in keys if key.startswith("run.") and key != "run.seed"]
    if own:
        raise InputError(f"{path}: {own[0]} is each trial's own and cannot be searched or overridden")
    for name, sampler in search.space.items():
        if sampler.key in ("optim.epochs", "data.holdout", "data.holdout_seed"):
            raise InputError(f"space.{name}: {sampler.key} cannot be sampled, trials of a study are compared by it; "
                             "make it an axis of studies")


def _uniform(seed, number, name):
    label = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return float(np.random.default_rng([seed, number, label]).random())


def _check_sampler(where, sampler):
    if not sampler.key:
        raise InputError(f"{where}.key is missing: the dotted recipe key that is sampled, as optim.lr")
    if sampler.sample == "choice":
        if not sampler.values:
            raise InputError(f"{where}.values is empty; sample: choice needs some")
        return
    if sampler.low is None or sampler.high is None or not sampler.low < sampler.high:
        raise InputError(f"{where}: low = {sampler.low}, high = {sampler.high}; {sampler.sample} needs low < high")
    if sampler.sample == "loguniform" and not sampler.low > 0:
        raise InputError(f"{where}.low = {sampler.low}, allowed for loguniform: above 0")
