"""Simulate a search from recorded learning curves: what a scheduler would have done, without training anything.

A search is a list of trials in their order of start, some workers that each take the next trial when they are free, and
a scheduler that gets the score of every trial after every epoch and answers CONTINUE or STOP. Once every trial has been
trained to its end, any scheduler, order and number of workers can be simulated from the same curves in milliseconds.
The end of each curve is known, also for trials that the scheduler stops, and so is the cost of stopping them:

    runs = simulate(curves, scheduler, epochs=16, workers=8)    # curves in the order in which the trials start
    result = judge(runs, [curve for curve in curves if curve.study == "2"], epochs=16)

Time is simulated because asynchronous halving depends on it: a trial is compared with those that reached its rung
earlier, so a slow trial faces another cut-off than a fast one. Epochs end in the order given by their recorded seconds;
of two that end at the same time, the trial that started first comes first. Nothing is random.

A scheduler is any object with `decide(study, key, epoch, score)`.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tune.store.status import TrialStatus

CONTINUE, STOP = "CONTINUE", "STOP"  # Ray's constants
WORST = 0.0  # top-1 of a trial that diverged


class Scheduler(Protocol):
    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        """CONTINUE or STOP, after an epoch. score: None if the trial diverged in it."""


@dataclass(frozen=True)
class Curve:
    """The learning curve of one configuration, trained to its end."""

    study: str
    number: int
    scores: tuple[float, ...]  # by epoch, higher is better; if they end early, the trial diverged in the next epoch
    seconds: float = 1.0  # per epoch

    @property
    def key(self) -> str:
        return f"{self.study}/{self.number:03d}"

    def score(self, epoch: int) -> float | None:
        """Score at the end of an epoch, counted from 1; None if the trial has diverged by then."""
        return self.scores[epoch - 1] if epoch <= len(self.scores) else None

    def final(self, epochs: int) -> float:
        """Score at the end of the full schedule."""
        score = self.score(epochs)
        return WORST if score is None else score


@dataclass
class Run:
    """A configuration's trial in one simulated search."""

    curve: Curve
    epochs: int = 0  # trained; the one in which a trial diverges counts
    status: TrialStatus = TrialStatus.WAITING


@dataclass(frozen=True)
class StudyResult:
    """The result of one simulated search for one study."""

    regret: float  # final score of the best configuration minus that of the chosen one, in points
    share: float  # trained epochs / epochs of the full schedules of all configurations
    survivors: int  # trials that reached the last epoch


class NoStopping:
    """A scheduler that stops no trial."""

    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        return CONTINUE


def simulate(curves: Sequence[Curve], scheduler: Scheduler, epochs: int, workers: int) -> list[Run]:
    """Run the trials of all curves, which start in the order of the list; returns them in that order."""
    runs = [Run(curve) for curve in curves]
    waiting = iter(range(len(runs)))
    running: list[tuple[float, int, int]] = []  # a heap: (time at which an epoch ends, index of the trial, epoch)

    def start_next(now: float) -> None:
        index = next(waiting, None)
        if index is not None:
            heapq.heappush(running, (now + curves[index].seconds, index, 1))

    for _ in range(workers):
        start_next(0.0)
    while running:
        now, index, epoch = heapq.heappop(running)
        run, curve = runs[index], curves[index]
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
            heapq.heappush(running, (now + curve.seconds, index, epoch + 1))
            continue
        start_next(now)
    return runs


def affordable(curves: Sequence[Curve], epochs: int, budget: float) -> list[Curve]:
    """Random search: the first trials that can be trained in full within `budget` epochs.

    A trial starts only if the budget covers its whole schedule, because nobody knows in advance that it will diverge.
    The epochs that it then saves are spent on others.
    """
    taken: list[Curve] = []
    spent = 0
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


def judge(runs: Sequence[Run], curves: Sequence[Curve], epochs: int) -> StudyResult:
    """Judge one study's runs by all of its recorded curves, including those that the search never started."""
    best = max(curve.final(epochs) for curve in curves)
    return StudyResult(regret=best - chosen(runs).final(epochs),
                       share=sum(run.epochs for run in runs) / (epochs * len(curves)),
                       survivors=sum(run.status is TrialStatus.FINISHED for run in runs))
