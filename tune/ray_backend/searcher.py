"""The course of the search, as Ray Tune asks for it: a Searcher that suggests the next trial and hears its results.

Tune is never asked to restore anything. A search that goes on is a new Tune experiment whose first trials are those
that were interrupted; what they were, what they have reported and what ASHA has decided stands in the search's own
files, which are written with every decision. (Tune's snapshots are ten seconds or more apart, and what it restores
without them comes back under new names.)
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from nulsq.run.status import read_status
from tune.queue import TrialQueue
from tune.ray_backend.trial_protocol import directory
from tune.space import Search, Trial, stratum
from tune.store import journal
from tune.store.results import read_stopped, remove_checkpoints
from tune.store.status import TrialStatus


class StudySearcher(Searcher):
    """Suggests trials in the order of a TrialQueue and keeps the journal.

    Args:
        common: what every trial's configuration has beside `trial`, see `configuration`.
        cost: of a trial's network, see `tune.checks.NetworkCosts`.
    """

    def __init__(self, course: TrialQueue, folder: Path, common: dict[str, Any],
                 cost: Callable[[Trial], dict[str, float]]):
        super().__init__()
        self.course, self.folder, self.common, self.cost = course, folder, common, cost
        self.keys = {}  # Tune's id -> key
        self.heard = {(event["key"], event["epoch"]) for event in journal.events(folder) if event["event"] == "result"}

    def set_search_properties(self, metric, mode, config, **spec) -> bool:
        return True  # Tune knows no metric here: the scheduler does

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        new = len(self.course.trials)
        trial = self.course.next()
        if trial is None:
            return Searcher.FINISHED if self.course.idle else None
        if len(self.course.trials) > new:
            trial = dataclasses.replace(trial, cost=self.cost(trial))
            self.course.trials[trial.key] = trial
            journal.append(self.folder, trial)
        journal.event(self.folder, "start", trial.key)
        self.keys[trial_id] = trial.key
        return configuration(self.common, self.course.search, trial)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "epoch" not in result or result["diverged"]:
            return  # Tune's own, of a trial that ended without a report; or no score to hear of
        key, score = self.keys[trial_id], result[self.course.search.metric]
        self.course.result(key, result["epoch"], score)
        if (key, result["epoch"]) not in self.heard:  # a trial that goes on tells its epochs again
            self.heard.add((key, result["epoch"]))
            journal.event(self.folder, "result", key, epoch=result["epoch"], score=score, seconds=result["seconds"],
                          node=result.get("hostname"), process=result.get("pid"))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:  # the one that the scheduler answered with STOP is told here alone
            self.on_trial_result(trial_id, result)
        key = self.keys[trial_id]
        path = directory(self.folder, key)
        status = self.course.failure(key) if error else TrialStatus.of_run(read_status(path))
        if status is not TrialStatus.DIVERGED and key in read_stopped(self.folder):
            status = TrialStatus.STOPPED
        elif not status.ended:
            status = TrialStatus.WAITING  # the search is being interrupted, or no process had begun the trial
        if status.discarded:
            remove_checkpoints(path)
        journal.event(self.folder, "end", key, status=status)
        self.course.end(key, status)

    # What Tune would keep of a searcher is in the journal.

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its own folder")

    def __getstate__(self):
        return {}


def configuration(common: dict[str, Any], search: Search, trial: Trial) -> dict[str, Any]:
    """What a trial gets: see `tune.ray_backend.trial.run`."""
    overrides = search.overrides | trial.overrides
    return common | {"trial": {"study": trial.study, "number": trial.number, "key": trial.key,
                               "repeat": trial.repeat, "stratum": stratum(search, trial),
                               "overrides": overrides}}
