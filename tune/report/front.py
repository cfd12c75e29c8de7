"""The Pareto front: what no other point beats in both cost and score.

A point is dominated by one that costs no more and scores no worse, and is better in at least one of the two. Which
points are compared decides what a front means. Here each study enters with its finalists, whose scores are means over
their seeds; single trials enter only where their cost is their own (a search that samples bits), since the best of
many single trials of one cost is a lucky draw more often than a better network.
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
    number: int
    score: float
    spread: float | None  # standard deviation over seeds
    seeds: int
    cost: dict[str, float]


def front(costs: Sequence[float], scores: Sequence[float], mode: str = "max") -> list[int]:
    """Indices of the points that none dominates, by rising cost; of points that are equal in both, all."""
    sign = 1 if mode == "max" else -1
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -sign * scores[i]))
    kept: list[int] = []
    for i in order:
        last = kept[-1] if kept else None
        if last is None or sign * scores[i] > sign * scores[last] or \
                (costs[i], scores[i]) == (costs[last], scores[last]):
            kept.append(i)
    return kept


def points(findings: Findings, cost: str) -> list[Point]:
    """All points that have this cost, in the order of the studies."""
    found = []
    for study in findings.studies:
        own = findings.finalists.get(study.name, [])
        own = [each for each in own if cost in each.rows[0].trial.cost]
        found += [_point(each.rows[0], each.mean, each.spread, len(each.scores)) for each in own]
        taken = {each.rows[0].trial.cost[cost] for each in own}
        found += [_point(row, row.score, None, 1) for row in findings.own(study.name)
                  if row.good and own and row.epochs == own[0].rows[0].epochs
                  and row.trial.cost.get(cost, None) not in {None, *taken}]
    return found


def _point(row: TrialResult, score: float, spread: float | None, seeds: int) -> Point:
    return Point(row.trial.study, row.trial.number, score, spread, seeds, row.trial.cost)
