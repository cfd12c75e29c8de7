"""Importance of each hyperparameter by fANOVA (Hutter et al., 2014, https://proceedings.mlr.press/v32/hutter14.html).

A random forest learns the score from the hyperparameters. The importance of a hyperparameter is the share of the
forest's variance over the whole space that depends on it alone. The shares add up to less than 1; the rest is
interactions. The forest is Optuna's.

Three decisions keep the numbers meaningful:

1. Scores are compared at the common epoch of a study (`findings.py`), not at the last epoch of each trial.
2. The forest sees the quantile of a value in its sampler, so that a log-uniform learning rate counts by its logarithm.
   Optuna alone would weight it linearly: the upper tenth of a range over two decades would dominate.
3. A forest also explains noise, the more so the fewer trials it sees. Each share therefore comes with its standard
   deviation over bootstrap samples of the trials (each with a forest of its own seed) and with the share that the
   hyperparameter gets when the scores are shuffled.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nulsq.errors import require
from tune.report.findings import Comparison
from tune.space import Sampler

MIN_TRIALS = 8
BOOTSTRAPS, SHUFFLES, TREES = 12, 6, 16
MAX_SAMPLE = 80  # trials of one bootstrap sample: the time grows with their square


@dataclass
class Importance:
    """Shares of the variance by the name of the hyperparameter, or the reason why there are none."""

    epoch: int = 0
    trials: int = 0
    mean: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)  # standard deviation over bootstrap samples
    chance: dict[str, float] = field(default_factory=dict)  # mean with shuffled scores
    reason: str = ""


def importance(space: dict[str, Sampler], comparison: Comparison | None, *, bootstraps: int = BOOTSTRAPS,
               shuffles: int = SHUFFLES, seed: int = 0) -> Importance:
    """Importances from the trials of one study at their common epoch. The same `seed` gives the same numbers."""
    if not space:
        return Importance(reason="no hyperparameter is sampled")
    if comparison is None:
        return Importance(reason="no trial has a score yet")
    epoch, trials = comparison.epoch, len(comparison)
    reason = _why_not(space, comparison)
    if reason:
        return Importance(epoch, trials, reason=reason)
    random = np.random.default_rng(seed)
    x = [[quantile(space[name], result.trial.drawn[name]) for name in space] for result in comparison.results]
    y = np.asarray(comparison.scores)
    size = min(trials, MAX_SAMPLE)
    bootstrapped = [_shares(space, x, y, random.integers(trials, size=size), i) for i in range(bootstraps)]
    shuffled = [_shares(space, x, random.permutation(y), random.integers(trials, size=size), i)
                for i in range(shuffles)]
    bootstrapped, shuffled = ([shares for shares in samples if shares] for samples in (bootstrapped, shuffled))
    if len(bootstrapped) < 2:
        return Importance(epoch, trials, reason=f"nearly all {trials} trials have the same score at epoch {epoch}")
    return Importance(epoch, trials, _by_name(statistics.fmean, bootstrapped, space),
                      _by_name(statistics.stdev, bootstrapped, space),
                      _by_name(statistics.fmean, shuffled, space) if shuffled else {})


def _why_not(space: dict[str, Sampler], comparison: Comparison) -> str:
    """Why importances cannot be estimated; "" if they can."""
    epoch, trials = comparison.epoch, len(comparison)
    if trials < MIN_TRIALS:
        have = "1 trial has" if trials == 1 else f"{trials} trials have"
        return f"{have} a score at epoch {epoch}, at least {MIN_TRIALS} are needed to estimate importance"
    if len(set(comparison.scores)) == 1:
        return f"all {trials} trials have the same score at epoch {epoch}"
    if all(len({str(result.trial.drawn[name]) for result in comparison.results}) == 1 for name in space):
        return "all trials have the same hyperparameters"
    return ""


def quantile(sampler: Sampler, value: Any) -> float:
    """The quantile of a value in its sampler, in [0, 1]; for a choice, the index of the value."""
    if sampler.sample == "choice":
        return sampler.values.index(value)
    low, high = sampler.low, sampler.high
    assert low is not None and high is not None
    if sampler.sample == "loguniform":
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _shares(space: dict[str, Sampler], x: Sequence[Sequence[float]], y: np.ndarray, chosen: np.ndarray,
            seed: int) -> dict[str, float]:
    """fANOVA of the chosen trials; {} if their scores have no variance to explain."""
    if len(set(y[chosen])) == 1:
        return {}
    optuna = require("optuna", "search")
    require("sklearn", "search")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: optuna.distributions.CategoricalDistribution(range(len(sampler.values)))
                     if sampler.sample == "choice" else optuna.distributions.FloatDistribution(0, 1)
                     for name, sampler in space.items()}
    study = optuna.create_study()
    study.add_trials([optuna.trial.create_trial(params=dict(zip(space, x[i], strict=True)),
                                                distributions=distributions, value=float(y[i])) for i in chosen])
    try:
        shares = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed).evaluate(study)
    except RuntimeError:  # no tree of the forest has any variance
        return {}
    return {name: float(shares[name]) for name in space}


def _by_name(statistic: Callable[[list[float]], float], samples: list[dict[str, float]],
             names: Iterable[str]) -> dict[str, float]:
    return {name: statistic([shares[name] for shares in samples]) for name in names}
