"""A search played back from recorded learning curves: what a scheduler would have done, without training anything.

A search is a list of trials in their order of start, some workers that each take the next trial when they are free, and
a scheduler that hears the score of every trial after every epoch and answers CONTINUE or STOP. If every trial was once
trained to its end, then any scheduler, any order and any number of workers can be tried on the same curves in
milliseconds, hundreds of times; and since the end of each curve is known, also of the trials that were stopped, so is
what stopping them has cost:

    runs = simulate(curves, scheduler, epochs=16, workers=8)    # curves in the order in which the trials start
    found = judge(runs, [curve for curve in curves if curve.study == "2"], epochs=16)

Time is simulated because asynchronous halving depends on it: a trial is compared with those that reached its rung
before it did, so a slow one meets another cut-off than a quick one. Epochs end in the order of their recorded seconds;
of two that end at once, that of the trial that started first is told first. Nothing here is random.

The scheduler is whatever has `decide(study, key, epoch, score)`; this module knows none.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tune.store.status import TrialStatus

CONTINUE, STOP = "CONTINUE", "STOP"  # as Ray spells them
WORST = 0.0  # top-1 of a trial that diverged


class Scheduler(Protocol):
    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        """CONTINUE or STOP, after an epoch; the score is None where the trial diverged in it."""


@dataclass(frozen=True)
class Curve:
    """What one configuration did when nothing stopped it."""

    study: str
    number: int
    scores: tuple[float, ...]  # by epoch, more is better; fewer than the schedule has: it diverged in the next one
    seconds: float = 1.0  # that an epoch takes

    @property
    def key(self) -> str:
        return f"{self.study}/{self.number:03d}"

    def score(self, epoch: int) -> float | None:
        """At the end of an epoch, 1 is the first; None: it diverged before."""
        return self.scores[epoch - 1] if epoch <= len(self.scores) else None

    def final(self, epochs: int) -> float:
        """Where the full schedule ends."""
        score = self.score(epochs)
        return WORST if score is None else score


@dataclass
class Run:
    """What became of a configuration's trial in one simulated search."""

    curve: Curve
    epochs: int = 0  # paid for: the one in which a trial diverges counts whole
    status: TrialStatus = TrialStatus.WAITING


@dataclass(frozen=True)
class Found:
    """What one simulated search made of one study."""

    regret: float  # points between the best configuration there was and the one that was chosen, both trained in full
    share: float  # epochs paid for, of those that the full schedule of all its configurations has
    survivors: int  # trials that reached the last epoch


class Patience:
    """The scheduler that stops nothing."""

    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        return CONTINUE


def simulate(curves: Sequence[Curve], scheduler: Scheduler, epochs: int, workers: int) -> list[Run]:
    """Run the trials of all curves, which start in the order of the list; returns them in that order."""
    runs = [Run(curve) for curve in curves]
    waiting = iter(range(len(runs)))
    running: list[tuple[float, int, int]] = []  # a heap: when an epoch ends, whose (place in the order), which

    def start_next(now: float) -> None:
        place = next(waiting, None)
        if place is not None:
            heapq.heappush(running, (now + curves[place].seconds, place, 1))

    for _ in range(workers):
        start_next(0.0)
    while running:
        now, place, epoch = heapq.heappop(running)
        run, curve = runs[place], curves[place]
        score = curve.score(epoch)
        answer = scheduler.decide(curve.study, curve.key, epoch, score)
        run.epochs = epoch
        if score is None:
            run.status = TrialStatus.DIVERGED
        elif epoch == epochs:
            run.status = TrialStatus.FINISHED  # whatever the answer: a trial ends its last epoch by itself
        elif answer == STOP:
            run.status = TrialStatus.STOPPED
        else:
            heapq.heappush(running, (now + curve.seconds, place, epoch + 1))
            continue
        start_next(now)
    return runs


def affordable(curves: Sequence[Curve], epochs: int, budget: float) -> list[Curve]:
    """The first trials that so many epochs pay for in full: random search.

    A trial starts only if its whole schedule is paid for, for that it will diverge is not known before; what it then
    leaves over pays for others.
    """
    taken, spent = [], 0
    for curve in curves:
        if spent + epochs > budget:
            break
        taken.append(curve)
        spent += min(len(curve.scores) + 1, epochs)
    return taken


def chosen(runs: Sequence[Run]) -> Curve:
    """The best trial of a study by the rule of `tune.store.results.ranked`: longest trained, then best score at its
    last epoch, then earliest start; a diverged one only where there is no other."""
    return min(runs, key=lambda run: (run.status.lost, -run.epochs, -run.curve.final(run.epochs))).curve


def judge(runs: Sequence[Run], curves: Sequence[Curve], epochs: int) -> Found:
    """Judge one study's runs by all of its recorded curves, those that the search never started among them."""
    best = max(curve.final(epochs) for curve in curves)
    return Found(regret=best - chosen(runs).final(epochs),
                 share=sum(run.epochs for run in runs) / (epochs * len(curves)),
                 survivors=sum(run.status is TrialStatus.FINISHED for run in runs))
