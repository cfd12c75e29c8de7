"""Epochs and seconds that a search spent on training, and what it would have spent without early stopping."""

import statistics
from dataclasses import dataclass

from tune.report.findings import Findings
from tune.store.results import TrialResult
from tune.store.status import TrialStatus


@dataclass
class Effort:
    """Epochs and seconds of training.

    full_epochs, full_seconds: without early stopping; the seconds are an estimate
    repeat_epochs, repeat_seconds: of finalists with other seeds, which the other numbers do not include
    """

    epochs: int
    full_epochs: int
    repeat_epochs: int
    seconds: float
    full_seconds: float
    repeat_seconds: float

    @property
    def saved(self) -> float:
        """Share of the time that early stopping saved."""
        return 1 - self.seconds / self.full_seconds if self.full_seconds else 0.0

    def __str__(self) -> str:
        repeats = f", {self.repeat_epochs} more for the finalists' other seeds" if self.repeat_epochs else ""
        return f"{self.epochs} epochs trained, {self.full_epochs} without early stopping{repeats}"


def effort(findings: Findings) -> Effort:
    """Epochs that a trial did not train are assumed to take as long as the epochs that it trained, or as the median of
    its study if it trained none. A trial that diverged has no epochs left to train."""
    trials, repeats = findings.first_seeds, findings.repeats
    medians = {study.name: statistics.median([_seconds_per_epoch(result) for result in trials
                                              if result.trial.study == study.name and result.epochs] or [0.0])
               for study in findings.studies}
    full_epochs, full_seconds = 0, 0.0
    for result in trials:
        full = result.epochs if result.status is TrialStatus.DIVERGED else findings.full_epochs[result.trial.study]
        pace = _seconds_per_epoch(result) if result.epochs else medians[result.trial.study]
        full_epochs += full
        full_seconds += result.seconds + max(0, full - result.epochs) * pace
    return Effort(sum(result.epochs for result in trials), full_epochs, sum(result.epochs for result in repeats),
                  sum(result.seconds for result in trials), full_seconds, sum(result.seconds for result in repeats))


def _seconds_per_epoch(result: TrialResult) -> float:
    return result.seconds / result.epochs
