"""Sources of a trial's hyperparameters: points, random, quasi-random, or Optuna's TPE.

A sample is a function of (seed, study, number, observations), never of a sampler's inner state. So nothing has to be
saved or restored, adding trials leaves earlier ones as they were, and a continued search samples what the uninterrupted
one would have sampled from the same results. Random and quasi-random samples do not depend on results: trial n has the
same one in every study, so studies are compared on the same hyperparameters.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune.space import WORST_SCORE, Search, Trial
from tune.store.status import TrialStatus
from tune.subprocess_call import run_in_subprocess

STARTUP = 10  # trials of a study that are sampled at random before TPE takes over, Optuna's default


@dataclass(frozen=True)
class Observation:
    """What TPE learns about a trial."""

    drawn: dict[str, Any]  # sampler's name -> value
    curve: list[float]  # the metric after each epoch
    status: TrialStatus  # finished, stopped, diverged or running
    cost: dict[str, float]


def sample(search: Search, study: str, number: int, observations: list[Observation],
           warm_start: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Sampler's name -> value for trial `number` of a study, and the source of the values.

    Args:
        observations: the study's trials so far, and those of the search that this one starts from; used by TPE only.
        warm_start: hyperparameters of another search that are tried first, after the points.
    """
    points = [*((point, "point") for point in search.points.values()), *((values, "warm") for values in warm_start)]
    if number < len(points):
        return points[number]
    if search.searcher == "quasirandom":
        return sample_quasirandom(search, number), "quasirandom"
    if search.searcher == "tpe" and len(observations) >= STARTUP:
        return sample_tpe(search, study, number, observations), "tpe"
    return sample_random(search, number), "random"


def sample_random(search: Search, number: int) -> dict[str, Any]:
    """Independent values: each depends on (seed, number, sampler's name) alone. Adding a sampler changes no other."""
    return {name: sampler.quantile(float(np.random.default_rng([search.seed, number, _hash(name)]).random()))
            for name, sampler in search.space.items()}


def sample_quasirandom(search: Search, number: int) -> dict[str, Any]:
    """Point `number` of a scrambled Sobol sequence (Owen 1998), a dimension per sampler in the order of the file."""
    if not search.space:
        return {}
    count = max(64, 1 << number.bit_length())  # many at once, because each call may start a process
    point = _sobol(len(search.space), search.seed, count)[number]
    # Scrambled points may reach 1.0 in float32; a quantile is below 1.
    return {name: sampler.quantile(min(u, 1 - 2**-24))
            for (name, sampler), u in zip(search.space.items(), point, strict=True)}


@functools.cache
def _sobol(dimensions: int, seed: int, count: int) -> list[list[float]]:
    return run_in_subprocess(sobol, dimensions, seed, count)


def sobol(dimensions: int, seed: int, count: int) -> list[list[float]]:
    """The first points of a scrambled Sobol sequence, each in [0, 1]^dimensions. Imports torch."""
    from torch.quasirandom import SobolEngine

    return SobolEngine(dimensions, scramble=True, seed=seed).draw(count).tolist()


def sample_tpe(search: Search, study: str, number: int, observations: list[Observation]) -> dict[str, Any]:
    """Tree-structured Parzen estimator (Bergstra et al. 2011; Optuna's, multivariate).

    A trial that was stopped early is passed as pruned at its last epoch, not as complete with that epoch's score. TPE
    then ranks it after all finished trials, longer trained ones first. Running trials keep others away from the same
    place (constant liar). Optuna has no pruning with two objectives. There a stopped trial violates a constraint, by
    the fraction of epochs that it lacks, which gives the same ranking.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    two_objectives = search.against != "none"
    minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    directions = [maximize if search.mode == "max" else minimize, *([minimize] if two_objectives else [])]
    sampler = optuna.samplers.TPESampler(seed=_hash(f"{search.seed} {study} {number}"), multivariate=True,
                                         constant_liar=True, n_startup_trials=STARTUP)
    optuna_study = optuna.create_study(directions=directions, sampler=sampler)
    space = distributions(search)
    full = max((len(seen.curve) for seen in observations if seen.status is TrialStatus.FINISHED), default=0)
    for seen in observations:
        params: dict[str, Any] = {"params": seen.drawn, "distributions": space}
        finite = [score for score in seen.curve if math.isfinite(score)]
        diverged = seen.status is TrialStatus.DIVERGED or not finite
        if seen.status is TrialStatus.RUNNING:
            trial = create_trial(state=TrialState.RUNNING, **params)
        elif two_objectives:
            lacking = 0.0 if seen.status is TrialStatus.FINISHED else max(1 - len(finite) / max(full, 1), 1e-3)
            score = WORST_SCORE[search.metric] if diverged else finite[-1]
            trial = create_trial(values=[score, seen.cost[search.against]],
                                 constraints={"epochs": 1.0 if diverged else lacking}, **params)
        elif diverged:  # pruned without a score: ranked after all others
            trial = create_trial(state=TrialState.PRUNED, **params)
        elif seen.status is TrialStatus.FINISHED:
            trial = create_trial(value=finite[-1], **params)
        else:
            scores = dict(enumerate(finite, start=1))
            trial = create_trial(state=TrialState.PRUNED, intermediate_values=scores, **params)
        optuna_study.add_trial(trial)
    return dict(optuna_study.ask(space).params)


def distributions(search: Search) -> dict[str, Any]:
    """The space as Optuna's distributions."""
    import optuna

    return {name: optuna.distributions.CategoricalDistribution(sampler.values) if sampler.sample == "choice" else
            optuna.distributions.FloatDistribution(*sampler.bounds, log=sampler.sample == "loguniform")
            for name, sampler in search.space.items()}


def inside(search: Search, drawn: dict[str, Any]) -> bool:
    """Whether hyperparameters of another search lie inside this search's space."""
    return set(drawn) == set(search.space) and all(search.space[name].holds(value) for name, value in drawn.items())


def trial_of(search: Search, study: str, grid: dict[str, Any], number: int, drawn: dict[str, Any],
             source: str) -> Trial:
    """A trial with its recipe keys: the study's cell of the grid, then the sampled values."""
    sampled = {search.space[name].key: value for name, value in drawn.items()}
    return Trial(study, number, grid | sampled, drawn, source)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
