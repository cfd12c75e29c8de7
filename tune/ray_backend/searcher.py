"""The trial queue as a Searcher of Ray Tune: it suggests the next trial and receives every trial's results.

Tune never restores anything. A continued search is a new Tune experiment whose first trials are the interrupted ones.
What they are, what they reported and what ASHA decided is in the search's own files, which are written with every
decision. (Tune takes its snapshots ten seconds or more apart, and trials that it restores without one get new names.)
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from nulsq.run.status import read_status
from tune.queue import TrialQueue
from tune.ray_backend.trial_protocol import TrialSettings
from tune.space import Trial
from tune.store import journal
from tune.store.directory import trial_directory
from tune.store.results import read_stopped, remove_checkpoints
from tune.store.status import TrialStatus


class StudySearcher(Searcher):
    """Suggests trials in the order of a TrialQueue and writes the journal.

    Args:
        queue: the trials of the search.
        folder: the search's directory, absolute.
        cost: returns the cost of a trial's network, see `tune.checks.NetworkCosts`.
    """

    def __init__(self, queue: TrialQueue, folder: Path, cost: Callable[[Trial], dict[str, float]]) -> None:
        super().__init__()
        self.queue, self.folder, self.cost = queue, folder, cost
        self.keys: dict[str, str] = {}  # Tune's trial id -> key
        self.recorded = {(event["key"], event["epoch"]) for event in journal.events(folder)
                         if event["event"] == "result"}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # the metric is not configured in Tune: only the scheduler compares trials

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray omits FINISHED
        count = len(self.queue.trials)
        trial = self.queue.next()
        if trial is None:
            return Searcher.FINISHED if self.queue.idle else None
        if len(self.queue.trials) > count:
            trial = dataclasses.replace(trial, cost=self.cost(trial))
            self.queue.trials[trial.key] = trial
            journal.append(self.folder, trial)
        journal.event(self.folder, "start", trial.key)
        self.keys[trial_id] = trial.key
        return TrialSettings.of(self.queue.search, trial, self.folder).to_config()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "epoch" not in result or result["diverged"]:
            return  # Tune's own result of a trial that ended without a report, or no score
        key, score = self.keys[trial_id], result[self.queue.search.metric]
        self.queue.result(key, result["epoch"], score)
        if (key, result["epoch"]) not in self.recorded:  # a continued trial reports its completed epochs again
            self.recorded.add((key, result["epoch"]))
            journal.event(self.folder, "result", key, epoch=result["epoch"], score=score, seconds=result["seconds"],
                          node=result.get("hostname"), process=result.get("pid"))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:  # Tune passes a result that the scheduler answered with STOP to this method only
            self.on_trial_result(trial_id, result)
        key = self.keys[trial_id]
        path = trial_directory(self.folder, key)
        status = self.queue.failure(key) if error else TrialStatus.of_run(read_status(path))
        if status is not TrialStatus.DIVERGED and key in read_stopped(self.folder):
            status = TrialStatus.STOPPED
        elif not status.ended:
            status = TrialStatus.WAITING  # the search is being interrupted, or no process had started the trial
        if status.discarded:
            remove_checkpoints(path)
        journal.event(self.folder, "end", key, status=status)
        self.queue.end(key, status)

    # Tune saves its searcher's state with these methods. All of that state is in the journal.

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is continued from its own folder")

    def __getstate__(self) -> dict[str, Any]:
        return {}
