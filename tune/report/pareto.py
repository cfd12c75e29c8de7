"""The Pareto front of score against cost.

A point is dominated by another one that costs no more and scores no worse, and is better in at least one of the two.
Each study contributes its finalists, whose scores are means over their seeds. Single trials contribute only where
their cost is their own, as in a search that samples bits: the best of many single trials of one cost is more often a
lucky draw than a better network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tune.report.findings import Findings
from tune.store.results import TrialResult

COSTS = {"average_bits": "average bits of weights and activations", "bytes": "bytes of the model, weights packed"}


@dataclass
class Point:
    """A trained configuration, with its score on the holdout and its cost."""

    study: str
    number: int  # of the trial
    score: float
    spread: float | None  # standard deviation over seeds
    seeds: int
    cost: dict[str, float]


def pareto_front(costs: Sequence[float], scores: Sequence[float], mode: str = "max") -> list[int]:
    """Indices of the points that no other point dominates, by rising cost. Points equal in both are all included."""
    sign = 1 if mode == "max" else -1
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -sign * scores[i]))
    front: list[int] = []
    for i in order:
        last = front[-1] if front else None
        if last is None or sign * scores[i] > sign * scores[last] or \
                (costs[i], scores[i]) == (costs[last], scores[last]):
            front.append(i)
    return front


def front_of(findings: Findings, points: list[Point], cost: str) -> list[int]:
    """Indices of the points on the front of score against one cost."""
    return pareto_front([point.cost[cost] for point in points], [point.score for point in points],
                        findings.search.mode)


def pareto_points(findings: Findings, cost: str) -> list[Point]:
    """All points whose cost is known, in the order of the studies."""
    points = []
    for study in findings.studies:
        finalists = [finalist for finalist in findings.finalists.get(study.name, [])
                     if cost in finalist.rows[0].trial.cost]
        points += [_point(finalist.rows[0], finalist.mean, finalist.spread, len(finalist.scores))
                   for finalist in finalists]
        taken = {finalist.rows[0].trial.cost[cost] for finalist in finalists}
        points += [_point(result, result.score, None, 1) for result in findings.ranked(study.name)
                   if result.good and finalists and result.epochs == finalists[0].rows[0].epochs
                   and result.trial.cost.get(cost) not in {None, *taken}]
    return points


def _point(result: TrialResult, score: float, spread: float | None, seeds: int) -> Point:
    return Point(result.trial.study, result.trial.number, score, spread, seeds, result.trial.cost)
