"""The results of a search with everything that several tables and figures derive from them, computed once.

Early stopping makes trials hard to compare: a trial stopped at epoch 1 has no score at epoch 9, and the trials that
have one were selected. Whatever relates scores to hyperparameters therefore compares the trials of a study at one
*common epoch*, the latest that nearly all of them reached, and names it.
"""

import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tune.space import Search, Study, full_epochs, rungs, studies
from tune.status import search_status
from tune.store.results import Finalist, TrialResult, finalists, ranked
from tune.store.status import SearchStatus, TrialStatus

NEARLY_ALL = 0.9  # share of a study's trials that reach the common epoch


@dataclass
class Comparison:
    """The scores of a study's trials at one epoch.

    A trial that diverged before that epoch gets the worst score of the others. Leaving it out would hide that its
    hyperparameters make training diverge.
    """

    epoch: int
    results: list[TrialResult]
    scores: list[float]
    imputed: list[bool]  # True: the trial diverged, its score is the worst of the others

    def __len__(self) -> int:
        return len(self.results)


@dataclass
class Findings:
    """The results of a search and what follows from them.

    tests: study -> evaluations of the seeds of its winner on the test images
    running: the search has not ended yet
    """

    search: Search
    results: list[TrialResult]
    tests: dict[str, list[dict[str, Any]]]
    running: bool = False

    @property
    def folder(self) -> Path:
        return self.search.directory

    @cached_property
    def studies(self) -> list[Study]:
        return studies(self.search)

    @cached_property
    def full_epochs(self) -> dict[str, int]:
        """Study -> epochs of a trial that is not stopped early."""
        return full_epochs(self.search)

    @cached_property
    def finalists(self) -> dict[str, list[Finalist]]:
        return finalists(self.search, self.results)

    def winner(self, study: str) -> Finalist | None:
        return self.finalists[study][0] if study in self.finalists else None

    @property
    def first_seeds(self) -> list[TrialResult]:
        """All trials but the repeats of finalists with other seeds."""
        return [result for result in self.results if not result.trial.repeat]

    @property
    def repeats(self) -> list[TrialResult]:
        """The finalists trained again with other seeds."""
        return [result for result in self.results if result.trial.repeat]

    def ranked(self, study: str) -> list[TrialResult]:
        """The study's trials without repeats, best first."""
        return ranked(self.results, study, self.search.mode)

    def rungs(self, study: str) -> list[int]:
        return rungs(self.full_epochs[study], self.search.grace, self.search.reduction)

    @property
    def state(self) -> SearchStatus:
        return search_status(self.folder, self.running)

    def status(self, result: TrialResult) -> TrialStatus:
        """The trial's status. A trial that is marked as running is interrupted if the search does not run."""
        interrupted = result.status is TrialStatus.RUNNING and self.state is not SearchStatus.RUNNING
        return TrialStatus.INTERRUPTED if interrupted else result.status

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return sum(result.status.ended for result in self.results)

    def comparison(self, study: str) -> Comparison | None:
        """The study's trials at its common epoch; None if no trial has a score."""
        begun = sorted((result for result in self.ranked(study) if result.curve),
                       key=lambda result: result.trial.number)
        lengths = [_finite_epochs(result.curve) for result in begun if result.status is not TrialStatus.DIVERGED]
        lengths = [length for length in lengths if length]
        if not lengths:
            return None
        epoch = max(candidate for candidate in lengths
                    if sum(length >= candidate for length in lengths) >= NEARLY_ALL * len(lengths))
        scores = {result.trial.key: result.curve[epoch - 1] for result in begun
                  if _finite_epochs(result.curve) >= epoch}
        worst = (min if self.search.mode == "max" else max)(scores.values())
        compared = [result for result in begun if result.trial.key in scores or result.status is TrialStatus.DIVERGED]
        return Comparison(epoch, compared, [scores.get(result.trial.key, worst) for result in compared],
                          [result.trial.key not in scores for result in compared])

    def test_accuracy(self, study: str) -> tuple[float, float | None, int] | None:
        """Top-1 of the study's winner on the test images: mean, standard deviation over seeds (None with one seed),
        number of seeds. None if it was not evaluated."""
        accuracies = [test["test_top1"] for test in self.tests.get(study) or []]
        if not accuracies:
            return None
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        return statistics.fmean(accuracies), spread, len(accuracies)

    # ---- numbers as text

    @property
    def decimals(self) -> int:
        return 4 if self.search.metric.endswith("loss") else 2

    def format_score(self, value: float | None) -> str:
        return "-" if value is None or not math.isfinite(value) else f"{value:.{self.decimals}f}"


def _finite_epochs(curve: list[float]) -> int:
    """Number of epochs before the first value that is not finite."""
    return next((i for i, value in enumerate(curve) if not math.isfinite(value)), len(curve))
