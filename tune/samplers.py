"""Where a trial's hyperparameters come from: points, random, quasi-random, or Optuna's TPE.

A draw is a function of (seed, study, number, what is known so far), never of a sampler's inner state. So nothing has
to be saved or restored, more trials leave the earlier ones as they were, and a search that is continued draws what the
uninterrupted one would have drawn from the same results. Random and quasi-random draws do not look at results: trial n
of every study has the same one, so studies are compared on the same hyperparameters.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune.ray_backend.trial_protocol import WORST
from tune.space import Search, Trial
from tune.store.status import TrialStatus
from tune.subprocess_call import run_in_subprocess

STARTUP = 10  # trials of a study that TPE draws at random, as Optuna does


@dataclass(frozen=True)
class Observation:
    """What a searcher is told about a trial: the truth."""

    drawn: dict[str, Any]
    curve: list[float]  # the metric after each epoch
    status: TrialStatus
    cost: dict[str, float]


def draw(search: Search, study: str, number: int, told: list[Observation], warm: list[dict[str, Any]]) \
        -> tuple[dict[str, Any], str]:
    """Sampler's name -> value for trial `number` of a study, and the source.

    Args:
        told: the study's trials so far, and those of the search that this one starts from; only TPE looks at them.
        warm: draws of another search that are tried first, after the points.
    """
    points = [*((point, "point") for point in search.points.values()), *((each, "warm") for each in warm)]
    if number < len(points):
        return points[number]
    if search.searcher == "quasirandom":
        return quasirandom(search, number), "quasirandom"
    if search.searcher == "tpe" and len(told) >= STARTUP:
        return tpe(search, study, number, told), "tpe"
    return random(search, number), "random"


def random(search: Search, number: int) -> dict[str, Any]:
    """Independent: a value depends on (seed, number, sampler's name) alone, another sampler leaves it as it is."""
    return {name: sampler.draw(float(np.random.default_rng([search.seed, number, _hash(name)]).random()))
            for name, sampler in search.space.items()}


def quasirandom(search: Search, number: int) -> dict[str, Any]:
    """Point `number` of a scrambled Sobol sequence (Owen 1998), a dimension per sampler in the order of the file."""
    if not search.space:
        return {}
    count = max(64, 1 << number.bit_length())  # not one by one: each time may be a process
    point = _sobol(len(search.space), search.seed, count)[number]
    # Scrambled points may reach 1.0 in float32; a quantile is below it.
    return {name: sampler.draw(min(u, 1 - 2**-24)) for (name, sampler), u in zip(search.space.items(), point,
                                                                               strict=True)}


@functools.cache
def _sobol(dimensions: int, seed: int, count: int) -> list[list[float]]:
    return run_in_subprocess(sobol, dimensions, seed, count)


def sobol(dimensions: int, seed: int, count: int) -> list[list[float]]:
    """The first points of a scrambled Sobol sequence, each in [0, 1]^dimensions."""
    from torch.quasirandom import SobolEngine

    return SobolEngine(dimensions, scramble=True, seed=seed).draw(count).tolist()


def tpe(search: Search, study: str, number: int, told: list[Observation]) -> dict[str, Any]:
    """Tree-structured Parzen estimator (Bergstra et al. 2011; Optuna's, multivariate).

    It hears the truth about trials that were stopped early: not that they ended with the score of their last epoch,
    but that they were pruned at that epoch, which ranks them behind all finished ones, the longer trained first.
    Running trials keep others from the same place (constant liar). With two objectives Optuna knows no pruning: there
    a stopped trial violates a constraint, by the share of epochs that it lacks, which ranks it in the same way.
    """
    import optuna
    from optuna.samplers._base import _CONSTRAINTS_KEY
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    two = search.against != "none"
    best = "maximize" if search.mode == "max" else "minimize"
    sampler = optuna.samplers.TPESampler(seed=_hash(f"{search.seed} {study} {number}"), multivariate=True,
                                         constant_liar=True, n_startup_trials=STARTUP)
    known = optuna.create_study(directions=[best, "minimize"] if two else [best], sampler=sampler)
    space = distributions(search)
    longest = max((len(each.curve) for each in told if each.status is TrialStatus.FINISHED), default=0)
    for each in told:
        params = {"params": each.drawn, "distributions": space}
        finite = [score for score in each.curve if math.isfinite(score)]
        if each.status is TrialStatus.RUNNING:
            known.add_trial(create_trial(state=TrialState.RUNNING, **params))
        elif two:
            lacks = 0.0 if each.status is TrialStatus.FINISHED else max(1 - len(finite) / max(longest, 1), 1e-3)
            if each.status is TrialStatus.DIVERGED or not finite:
                lacks, finite = 1.0, [WORST[search.metric]]
            known.add_trial(create_trial(values=[finite[-1], each.cost[search.against]],
                                         system_attrs={_CONSTRAINTS_KEY: (lacks,)}, **params))
        elif each.status is TrialStatus.DIVERGED or not finite:  # pruned without a score: ranked behind all others
            known.add_trial(create_trial(state=TrialState.PRUNED, **params))
        elif each.status is TrialStatus.FINISHED:
            known.add_trial(create_trial(value=finite[-1], **params))
        else:
            values = dict(enumerate(finite, start=1))
            known.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values=values, **params))
    return dict(known.ask(space).params)


def distributions(search: Search) -> dict[str, Any]:
    """The space in Optuna's words."""
    import optuna

    return {name: optuna.distributions.CategoricalDistribution(sampler.values) if sampler.sample == "choice" else
            optuna.distributions.FloatDistribution(sampler.low, sampler.high, log=sampler.sample == "loguniform")
            for name, sampler in search.space.items()}


def inside(search: Search, drawn: dict[str, Any]) -> bool:
    """Whether a draw of another search could be one of this."""
    return set(drawn) == set(search.space) and all(search.space[name].holds(value) for name, value in drawn.items())


def trial_of(search: Search, study: str, grid: dict[str, Any], number: int, drawn: dict[str, Any],
             source: str) -> Trial:
    """A trial with its recipe keys: the study's cell of the grid, then what was drawn."""
    sampled = {search.space[name].key: value for name, value in drawn.items()}
    return Trial(study, number, grid | sampled, drawn, source)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
