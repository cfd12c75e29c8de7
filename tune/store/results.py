"""What a search found, read from its folder: a row per trial, its finalists and winners.

Everything here comes from files (search.yaml, trials.jsonl, rungs, the trials' run directories), so that the search
itself, `tune.status` in another terminal and `tune.report` a year later see the same.

A trial's score is the metric on the holdout at its last epoch. Trials of a study are ranked by how long they were
trained (a rung stops the worse ones), then by score. The finalists, the best of each study, may have been trained
again with other seeds; the winner is the finalist with the best mean, and the only one that ever sees the test images.
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
from tune.ray_backend.trial_protocol import WORST, directory
from tune.space import Search, Trial, studies
from tune.store import journal
from tune.store.status import TrialStatus


@dataclass
class TrialResult:
    """What became of one trial."""

    trial: Trial
    status: TrialStatus
    epochs: int  # trained
    score: float  # the metric at the last epoch; the worst value where that is no number
    curve: list[float]  # the metric after each epoch
    seconds: float  # of training and evaluation, over all epochs
    path: Path  # run directory

    @property
    def good(self) -> bool:
        return self.status.ranked and bool(self.curve)

    @property
    def finished(self) -> bool:
        return self.status is TrialStatus.FINISHED


@dataclass
class Finalist:
    """A configuration of a study with all its seeds: the trial of the search first, then its repeats."""

    rows: list[TrialResult]

    @property
    def scores(self) -> list[float]:
        return [row.score for row in self.rows if row.finished]

    @property
    def lost(self) -> int:
        """Seeds with which it diverged or failed: that counts against it, whatever the others reached."""
        return sum(row.status.lost for row in self.rows)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None with one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def read_row(search: Search, trial: Trial, stopped: dict[str, int], failed: set[str]) -> TrialResult:
    """One trial's row; `stopped`: trial keys that ASHA ended, as the rungs file has them, `failed`: those of processes
    that were killed and could not say so themselves."""
    path = directory(search.directory, trial.key)
    metrics = read_metrics(path)
    status = TrialStatus.of_run(read_status(path)) if path.is_dir() else TrialStatus.WAITING
    if not status.ended and trial.key in failed:
        status = TrialStatus.FAILED
    # Whatever one of its ranks wrote while it was being killed.
    if trial.key in stopped and status is not TrialStatus.DIVERGED:
        status = TrialStatus.STOPPED
    if status is TrialStatus.STOPPED:  # a trial of several workers may have ended another epoch before it was killed
        metrics = [line for line in metrics if line["epoch"] <= stopped[trial.key]]
    curve = [line[search.metric] for line in metrics]
    worst = not curve or not math.isfinite(curve[-1]) or status is TrialStatus.DIVERGED
    return TrialResult(trial, status, metrics[-1]["epoch"] if metrics else 0,
                       WORST[search.metric] if worst else curve[-1], curve,
                       sum(line["seconds"] for line in metrics), path)


def collect(search: Search, trials: list[Trial]) -> list[TrialResult]:
    """Read every trial's run directory."""
    stopped, last = read_stopped(search.directory), {}
    for event in journal.events(search.directory):
        if event["event"] in ("start", "end"):
            last[event["key"]] = event
    failed = {key for key, event in last.items() if event.get("status") == TrialStatus.FAILED}
    return [read_row(search, trial, stopped, failed) for trial in trials]


def read_stopped(folder: Path) -> dict[str, int]:
    """Trial key -> epoch at which ASHA ended it."""
    file = folder / "rungs"
    return json.loads(file.read_text())["stopped"] if file.is_file() else {}


def remove_checkpoints(run: Path) -> None:
    """Free the disk of a trial that was stopped: nobody will go on with it. Its metrics stay."""
    folder = run / "checkpoints"
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if name.endswith(".pt"):
            (folder / name).unlink(missing_ok=True)


def ranked(rows: list[TrialResult], study: str, mode: str) -> list[TrialResult]:
    """A study's trials without repeats, best first: longest trained, then better score. What diverged or failed comes
    last."""
    sign = 1 if mode == "max" else -1
    own = [row for row in rows if row.trial.study == study and not row.trial.repeat]
    return sorted(own, key=lambda row: (not row.good, -row.epochs, -sign * row.score))


def finalists(search: Search, rows: list[TrialResult]) -> dict[str, list[Finalist]]:
    """Study -> its finalists, best mean first; studies in which no trial has reached its end are left out."""
    found = {}
    sign = 1 if search.mode == "max" else -1
    for study in studies(search):
        best = [row for row in ranked(rows, study.name, search.mode)[:search.finalists] if row.finished]
        own = [Finalist([row, *(each for each in rows if each.trial.repeat and each.trial.study == study.name
                                and each.trial.number == row.trial.number)]) for row in best]
        if own:
            found[study.name] = sorted(own, key=lambda finalist: (finalist.lost, -sign * finalist.mean))
    return found


def winners(search: Search, rows: list[TrialResult]) -> dict[str, Finalist]:
    """Study -> its winner; studies in which no trial has reached its end are left out."""
    return {study: own[0] for study, own in finalists(search, rows).items()}


def evaluate_winners(winners: dict[str, Finalist]) -> dict[str, list[dict[str, Any]]]:
    """Study -> each of the winner's seeds once on the test images; an earlier call's results are not measured again."""
    import torch  # not before: a search needs it for nothing else

    from nulsq.distributed import Ranks
    from nulsq.evaluate import evaluate_run, read_evaluation

    ranks = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {study: [read_evaluation(row.path) or evaluate_run(row.path, ranks=ranks)
                    for row in winner.rows if row.finished] for study, winner in winners.items()}


def read_evaluations(winners: dict[str, Finalist]) -> dict[str, list[dict[str, Any]]]:
    """The same from what was measured already; an empty list for a study whose winner was not evaluated yet."""
    return {study: [found for row in winner.rows if row.finished and (found := _measured(row))]
            for study, winner in winners.items()}


def _measured(row: TrialResult) -> dict[str, Any] | None:
    """Of a folder that was copied without its checkpoints the file is believed as it is: whether it belongs to the
    run's last checkpoint cannot be told."""
    from nulsq.evaluate import read_evaluation

    try:
        return read_evaluation(row.path)
    except InputError:
        return json.loads((row.path / "test.json").read_text())
