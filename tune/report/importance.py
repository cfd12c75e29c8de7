"""How much each hyperparameter matters: fANOVA (Hutter et al., 2014, https://proceedings.mlr.press/v32/hutter14.html).

A random forest learns the score from the hyperparameters; the importance of one is the share of the forest's variance
over the whole space that depends on it alone. What the shares leave of 1 is interactions. The forest is optuna's.

Three things keep the number honest:

1. Scores are those at a study's common epoch (`findings.py`), not each trial's last.
2. "Over the whole space" means as the search draws: the forest sees a hyperparameter's quantile in its sampler, so a
   log-uniform learning rate counts by its logarithm. (optuna alone would weigh it linearly, and the upper tenth of a
   range over two decades would be nine tenths of the answer.)
3. Few trials always find something: the forest explains noise too. So the share is given with its standard deviation
   over bootstrap samples of the trials (each with another seed of the forest), and beside it stands what shuffled
   scores would give.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nulsq.errors import require
from tune.report.findings import Comparison
from tune.space import Sampler

FEWEST = 8  # trials; a forest of fewer finds anything
BOOTSTRAPS, SHUFFLES, TREES = 12, 6, 16
MOST = 80  # trials of one sample: the time grows with their square


@dataclass
class Importance:
    """Shares of the variance by sampler's name; or `why` there are none."""

    epoch: int = 0
    trials: int = 0
    mean: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)  # standard deviation
    chance: dict[str, float] = field(default_factory=dict)  # mean with shuffled scores
    why: str = ""


def importance(space: dict[str, Sampler], found: Comparison | None, *, bootstraps: int = BOOTSTRAPS,
               shuffles: int = SHUFFLES, seed: int = 0) -> Importance:
    """Importances from the trials of one study at their common epoch. Repeatable: `seed` decides everything."""
    if found is None or not space:
        return Importance(why="nothing is sampled" if not space else "no trial has a score yet")
    drawn = [row.trial.drawn for row in found.rows]
    none = Importance(found.epoch, len(found))
    if len(found) < FEWEST:
        none.why = f"{len(found)} trials have a score at epoch {found.epoch}; fewer than {FEWEST} say nothing"
    elif len(set(found.scores)) == 1:
        none.why = f"all {len(found)} trials have the same score at epoch {found.epoch}"
    elif all(len({str(each[name]) for each in drawn}) == 1 for name in space):
        none.why = "all trials have the same hyperparameters"
    if none.why:
        return none
    random = np.random.default_rng(seed)
    x, y = [[position(space[name], each[name]) for name in space] for each in drawn], np.asarray(found.scores)
    size = min(len(found), MOST)
    bootstrapped = [_shares(space, x, y, random.integers(len(y), size=size), i) for i in range(bootstraps)]
    shuffled = [_shares(space, x, random.permutation(y), random.integers(len(y), size=size), i)
                for i in range(shuffles)]
    bootstrapped, shuffled = ([each for each in shares if each] for shares in (bootstrapped, shuffled))
    if len(bootstrapped) < 2:
        none.why = f"nearly all {len(found)} trials have the same score at epoch {found.epoch}"
        return none
    return Importance(found.epoch, len(found), _over(statistics.fmean, bootstrapped, space),
                      _over(statistics.stdev, bootstrapped, space),
                      _over(statistics.fmean, shuffled, space) if shuffled else {})


def position(sampler: Sampler, value: Any) -> float:
    """The quantile of a drawn value in its sampler, in [0, 1]; of a choice, its number."""
    if sampler.sample == "choice":
        return sampler.values.index(value)
    low, high = sampler.low, sampler.high
    if sampler.sample == "loguniform":
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _shares(space, x: Sequence[Sequence[float]], y: np.ndarray, chosen: np.ndarray, seed: int) -> dict[str, float]:
    """fANOVA of the chosen trials; empty where they leave no variance to explain."""
    if len(set(y[chosen])) == 1:
        return {}
    optuna = require("optuna", "search")
    require("sklearn", "search")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = {name: optuna.distributions.CategoricalDistribution(range(len(sampler.values)))
             if sampler.sample == "choice" else optuna.distributions.FloatDistribution(0, 1)
             for name, sampler in space.items()}
    study = optuna.create_study()
    study.add_trials([optuna.trial.create_trial(params=dict(zip(space, x[i], strict=True)), distributions=kinds,
                                                value=float(y[i])) for i in chosen])
    try:
        found = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed).evaluate(study)
    except RuntimeError:  # no tree of the forest has any variance
        return {}
    return {name: float(found[name]) for name in space}


def _over(function, shares: list[dict[str, float]], names) -> dict[str, float]:
    return {name: function([each[name] for each in shares]) for name in names}
