"""A search as the report looks at it: everything that more than one of its tables and pictures needs, worked out once.

Early stopping makes trials hard to compare: one that was stopped at epoch 1 has no score at epoch 9, and those that do
were selected. So whatever relates scores to hyperparameters looks at one *common epoch* of a study, the latest that
nearly all of its trials reached, and says which it is.
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

NEARLY_ALL = 0.9


@dataclass
class Comparison:
    """The scores of a study's trials at one epoch. Trials that diverged before it have the worst score of the others:
    a hyperparameter that makes trials diverge matters, and no number would hide it."""

    epoch: int
    rows: list[TrialResult]
    scores: list[float]
    imputed: list[bool]  # diverged: the score is the worst of the others

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Findings:
    """The rows of a search, and what follows from them. `tests`: study -> evaluations of its winner's seeds;
    `running`: the search goes on meanwhile."""

    search: Search
    rows: list[TrialResult]
    tests: dict[str, list[dict[str, Any]]]
    running: bool = False

    @property
    def folder(self) -> Path:
        return self.search.directory

    @cached_property
    def studies(self) -> list[Study]:
        return studies(self.search)

    @cached_property
    def full(self) -> dict[str, int]:
        """Study -> epochs of a trial that nothing stops."""
        return full_epochs(self.search)

    @cached_property
    def finalists(self) -> dict[str, list[Finalist]]:
        return finalists(self.search, self.rows)

    def winner(self, study: str) -> Finalist | None:
        return self.finalists[study][0] if study in self.finalists else None

    def own(self, study: str) -> list[TrialResult]:
        """The study's trials without repeats, best first."""
        return ranked(self.rows, study, self.search.mode)

    def rungs(self, study: str) -> list[int]:
        return rungs(self.full[study], self.search.grace, self.search.reduction)

    @property
    def state(self) -> SearchStatus:
        return search_status(self.folder, self.running)

    def status(self, row: TrialResult) -> TrialStatus:
        """As the row has it, but nothing runs in a search that does not."""
        interrupted = row.status is TrialStatus.RUNNING and self.state is not SearchStatus.RUNNING
        return TrialStatus.INTERRUPTED if interrupted else row.status

    @property
    def ended(self) -> int:
        return sum(row.status.ended for row in self.rows)

    def comparison(self, study: str) -> Comparison | None:
        """The study's trials at its common epoch; None where nothing has a score."""
        own = sorted((row for row in self.own(study) if row.curve), key=lambda row: row.trial.number)
        lengths = [_known(row.curve) for row in own if row.status is not TrialStatus.DIVERGED]
        lengths = [length for length in lengths if length]
        if not lengths:
            return None
        epoch = max(each for each in lengths if sum(length >= each for length in lengths) >= NEARLY_ALL * len(lengths))
        scores = {row.trial.key: row.curve[epoch - 1] for row in own if _known(row.curve) >= epoch}
        worst = (min if self.search.mode == "max" else max)(scores.values())
        kept = [row for row in own if row.trial.key in scores or row.status is TrialStatus.DIVERGED]
        return Comparison(epoch, kept, [scores.get(row.trial.key, worst) for row in kept],
                          [row.trial.key not in scores for row in kept])

    # ---- numbers as text

    def score(self, value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return "-"
        return f"{value:.{self.digits}f}"

    @property
    def digits(self) -> int:
        return 4 if self.search.metric.endswith("loss") else 2

    def tested(self, study: str) -> tuple[float, float | None, int] | None:
        """The winner's top-1 on test: mean, standard deviation over seeds (None with one), seeds."""
        found = [each["test_top1"] for each in self.tests.get(study) or []]
        if not found:
            return None
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found)


def _known(curve: list[float]) -> int:
    """Epochs before the first that is no number."""
    return next((i for i, value in enumerate(curve) if not math.isfinite(value)), len(curve))
