"""Results of a search, read from its folder: a result per trial, its finalists and winners.

Everything here comes from files (search.yaml, trials.jsonl, rungs, the trials' run directories), so that the search
itself, `tune.status` in another terminal and `tune.report` a year later see the same.

A trial's score is the metric on the holdout at its last epoch. Trials of a study are ranked by the number of epochs
that they were trained (a rung stops the worse ones), then by score. The finalists, the best of each study, may have
been trained again with other seeds. The winner is the finalist with the best mean; only winners are evaluated on the
test images.
"""

import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulsq.errors import InputError
from nulsq.run.directory import read_metrics
from nulsq.run.status import read_status
from tune.space import WORST_SCORE, Search, Trial, studies
from tune.store import journal
from tune.store.directory import RUNGS, trial_directory
from tune.store.status import TrialStatus


@dataclass
class TrialResult:
    """What became of one trial."""

    trial: Trial
    status: TrialStatus
    epochs: int  # trained
    score: float  # the metric at the last epoch; the worst score where that is not finite
    curve: list[float]  # the metric after each epoch
    seconds: float  # of training and evaluation, over all epochs
    path: Path  # run directory

    @property
    def good(self) -> bool:
        """Whether the trial has a score that counts."""
        return self.status.ranked and bool(self.curve)

    @property
    def finished(self) -> bool:
        return self.status is TrialStatus.FINISHED


@dataclass
class Finalist:
    """A configuration of a study with all its seeds: the first trial, then its repeats."""

    rows: list[TrialResult]

    @property
    def scores(self) -> list[float]:
        return [result.score for result in self.rows if result.finished]

    @property
    def lost(self) -> int:
        """The number of seeds that diverged or failed. A finalist with fewer of them ranks first."""
        return sum(result.status.lost for result in self.rows)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None with one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def read_result(search: Search, trial: Trial, stopped: dict[str, int], failed: set[str]) -> TrialResult:
    """Read one trial's result.

    Args:
        stopped: key -> epoch of the trials that ASHA stopped, from the rungs file.
        failed: keys of the trials that Tune gave up. A killed process cannot record that in its run directory.
    """
    path = trial_directory(search.directory, trial.key)
    metrics = read_metrics(path)
    status = TrialStatus.of_run(read_status(path)) if path.is_dir() else TrialStatus.WAITING
    if not status.ended and trial.key in failed:
        status = TrialStatus.FAILED
    if trial.key in stopped and status is not TrialStatus.DIVERGED:
        status = TrialStatus.STOPPED  # one of its ranks may have written another outcome while it was killed
        # A trial of several workers may have completed another epoch before it was killed.
        metrics = [line for line in metrics if line["epoch"] <= stopped[trial.key]]
    curve = [line[search.metric] for line in metrics]
    worst = not curve or not math.isfinite(curve[-1]) or status is TrialStatus.DIVERGED
    return TrialResult(trial, status, metrics[-1]["epoch"] if metrics else 0,
                       WORST_SCORE[search.metric] if worst else curve[-1], curve,
                       sum(line["seconds"] for line in metrics), path)


def collect(search: Search, trials: list[Trial]) -> list[TrialResult]:
    """Read the results of trials, in their order."""
    stopped, last_event = read_stopped(search.directory), {}
    for event in journal.events(search.directory):
        if event["event"] in ("start", "end"):
            last_event[event["key"]] = event
    failed = {key for key, event in last_event.items() if event.get("status") == TrialStatus.FAILED}
    return [read_result(search, trial, stopped, failed) for trial in trials]


def read_stopped(folder: Path) -> dict[str, int]:
    """Trial key -> epoch at which ASHA stopped it."""
    file = folder / RUNGS
    return json.loads(file.read_text())["stopped"] if file.is_file() else {}


def remove_checkpoints(run: Path) -> None:
    """Free the disk space of a trial that is not continued. Its metrics stay."""
    folder = run / "checkpoints"
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if name.endswith(".pt"):
            (folder / name).unlink(missing_ok=True)


def ranked(results: list[TrialResult], study: str, mode: str) -> list[TrialResult]:
    """A study's trials without repeats, best first: most epochs, then better score. Trials that diverged or failed come
    last."""
    sign = 1 if mode == "max" else -1
    own = [result for result in results if result.trial.study == study and not result.trial.repeat]
    return sorted(own, key=lambda result: (not result.good, -result.epochs, -sign * result.score))


def finalists(search: Search, results: list[TrialResult]) -> dict[str, list[Finalist]]:
    """Study -> its finalists, best mean first. Studies without a trial that finished are left out."""
    by_study = {}
    sign = 1 if search.mode == "max" else -1
    for study in studies(search):
        repeats = [result for result in results if result.trial.repeat and result.trial.study == study.name]
        best = [result for result in ranked(results, study.name, search.mode)[:search.finalists] if result.finished]
        own = [Finalist([first, *(repeat for repeat in repeats if repeat.trial.number == first.trial.number)])
               for first in best]
        if own:
            by_study[study.name] = sorted(own, key=lambda finalist: (finalist.lost, -sign * finalist.mean))
    return by_study


def winners(search: Search, results: list[TrialResult]) -> dict[str, Finalist]:
    """Study -> its winner. Studies without a trial that finished are left out."""
    return {study: own[0] for study, own in finalists(search, results).items()}


def evaluate_winners(winners: dict[str, Finalist]) -> dict[str, list[dict[str, Any]]]:
    """Study -> evaluations on the test images, one for each seed of its winner.

    Seeds that were evaluated already are not evaluated again.
    """
    import torch  # not at the top: the search's process needs it for nothing else

    from nulsq.distributed import Ranks
    from nulsq.evaluate import evaluate_run, read_evaluation

    ranks = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {study: [read_evaluation(result.path) or evaluate_run(result.path, ranks=ranks)
                    for result in winner.rows if result.finished] for study, winner in winners.items()}


def read_evaluations(winners: dict[str, Finalist]) -> dict[str, list[dict[str, Any]]]:
    """The evaluations that exist already, by study; an empty list for a study whose winner was not evaluated yet."""
    return {study: [evaluation for result in winner.rows
                    if result.finished and (evaluation := _read_evaluation(result)) is not None]
            for study, winner in winners.items()}


def _read_evaluation(result: TrialResult) -> dict[str, Any] | None:
    from nulsq.evaluate import read_evaluation

    try:
        return read_evaluation(result.path)
    except InputError:  # a folder copied without its checkpoints: whether the file belongs to the last one is unknown
        return json.loads((result.path / "test.json").read_text())
