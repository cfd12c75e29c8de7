"""The order of a search's trials. Pure bookkeeping without Ray: the search takes the next trial and reports results.

    1. Trials that were decided on and have not ended, because the search was interrupted. They continue from their
       checkpoints.
    2. A new trial of the study with the fewest trials, in the order of the grid, until each study has its budget.
       Studies take turns, so each gets its share of the cluster from the first minute.
    3. Once all trials of a study have ended: its finalists again with other seeds. Studies take turns here too.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from nulsq.errors import InputError
from tune.samplers import Observation, inside, sample, trial_of
from tune.space import Search, Trial, base_recipe, studies
from tune.store import journal
from tune.store.results import Finalist, TrialResult, collect, finalists, ranked
from tune.store.status import TrialStatus


class TrialQueue:
    """The trials of a search so far, their results, and which trial is next.

    Args:
        search: with every trial that --extend added.
        results: of the trials in its journal, from `tune.store.results.collect`; failed trials are tried again.
        warm_start: results of the search that this one starts from, by study, from `warm_start_results`.
    """

    def __init__(self, search: Search, results: list[TrialResult],
                 warm_start: dict[str, list[TrialResult]] | None = None) -> None:
        self.search = search
        self.studies = {study.name: study for study in studies(search)}
        self.trials = {result.trial.key: result.trial for result in results}
        self.curves = {result.trial.key: list(result.curve) for result in results}
        self.status: dict[str, TrialStatus] = {
            result.trial.key: result.status if result.status.ended and result.status is not TrialStatus.FAILED
            else TrialStatus.WAITING for result in results}
        self.warm_start: dict[str, list[TrialResult]] = {name: [] for name in self.studies} | (warm_start or {})
        self.started: set[str] = set()  # trials that a process has taken since `next` returned them
        self.lost: Counter[str] = Counter()  # how often no process took a trial that `next` had returned

    def next(self) -> Trial | None:
        """The next trial, new or interrupted, which now counts as running; None if there is none at the moment."""
        trial = self._interrupted() or self._new() or self._repeat()
        if trial is not None:
            self.trials[trial.key] = trial
            self.curves.setdefault(trial.key, [])
            self.status[trial.key] = TrialStatus.RUNNING
            self.started.discard(trial.key)
        return trial

    @property
    def idle(self) -> bool:
        """Whether no trial runs. If there is no next trial either, the search is at its end."""
        return TrialStatus.RUNNING not in self.status.values()

    @property
    def finished(self) -> bool:
        return self.unfinished() == 0 and not (self._new() or self._repeat())

    def unfinished(self) -> int:
        """The number of trials that run or wait."""
        return sum(not status.ended for status in self.status.values())

    def result(self, key: str, epoch: int, score: float) -> None:
        """Record a trial's score after an epoch. A continued trial reports its completed epochs again."""
        self.curves[key][epoch - 1:epoch] = [score]

    def end(self, key: str, status: TrialStatus) -> None:
        self.status[key] = status

    def failure(self, key: str) -> TrialStatus:
        """The status of a trial that Tune gave up.

        It failed if a process had taken it. Otherwise, where the process that was to take it has died, it waits for the
        next process, up to `retries` times.
        """
        if key in self.started:
            return TrialStatus.FAILED
        self.lost[key] += 1
        return TrialStatus.WAITING if self.lost[key] <= self.search.retries else TrialStatus.FAILED

    def observations(self, study: str) -> list[Observation]:
        """What TPE learns from: this study's trials in their order, then those of the search that this one starts from.
        """
        own = [Observation(trial.drawn, self.curves[key],
                           self.status[key] if self.status[key].ended else TrialStatus.RUNNING, trial.cost)
               for key, trial in self.trials.items()
               if trial.study == study and not trial.repeat and self.status[key] is not TrialStatus.FAILED]
        return own + [Observation(result.trial.drawn, result.curve, result.status, result.trial.cost)
                      for result in self.warm_start[study]]

    def budget(self) -> int:
        """The number of trials of the whole search, repeats included."""
        return len(self.studies) * (self.search.trials + self.search.finalists * self.search.repeats)

    def trial_result(self, key: str) -> TrialResult:
        """The result of a trial as far as the queue knows it, without reading its files."""
        curve = self.curves[key]
        return TrialResult(self.trials[key], self.status[key], len(curve), curve[-1] if curve else float("nan"),
                           curve, 0.0, Path(key))

    def _interrupted(self) -> Trial | None:
        return next((self.trials[key] for key, status in self.status.items() if status is TrialStatus.WAITING), None)

    def _new(self) -> Trial | None:
        counts = self._counts()
        name = min(counts, key=counts.__getitem__)
        if counts[name] >= self.search.trials:
            return None
        best: list[dict[str, Any]] = [result.trial.drawn
                                      for result in ranked(self.warm_start[name], name, self.search.mode)
                                      if result.good][:self.search.warm_best]
        drawn, source = sample(self.search, name, counts[name], self.observations(name), best)
        return trial_of(self.search, name, self.studies[name].overrides, counts[name], drawn, source)

    def _repeat(self) -> Trial | None:
        missing = []
        for name, own in self._finalists().items():
            present = {(trial.number, trial.repeat) for trial in self.trials.values() if trial.study == name}
            lacking = [(repeat, finalist.rows[0].trial) for repeat in range(1, self.search.repeats + 1)
                       for finalist in own if (finalist.rows[0].trial.number, repeat) not in present]
            missing += lacking[:1]
        if not missing:
            return None
        repeat, first = min(missing, key=lambda candidate: candidate[0])
        return repeat_of(self.search, first, repeat)

    def _finalists(self) -> dict[str, list[Finalist]]:
        """The finalists of each study whose trials have all ended."""
        if not self.search.repeats:
            return {}
        counts = self._counts()
        results = [self.trial_result(key) for key, trial in self.trials.items() if not trial.repeat]
        unfinished = {result.trial.study for result in results if not result.status.ended}
        return {name: own for name, own in finalists(self.search, results).items()
                if name not in unfinished and counts[name] >= self.search.trials}

    def _counts(self) -> dict[str, int]:
        """Study -> its trials so far, without repeats."""
        counts = dict.fromkeys(self.studies, 0)
        for trial in self.trials.values():
            counts[trial.study] += not trial.repeat
        return counts


def repeat_of(search: Search, first: Trial, repeat: int) -> Trial:
    """A finalist with the seed run.seed + `repeat`; everything else is equal."""
    seed = base_recipe(search, first.overrides).run.seed + repeat
    return replace(first, overrides=first.overrides | {"run.seed": seed}, source="repeat", repeat=repeat)


def warm_start_results(search: Search) -> dict[str, list[TrialResult]]:
    """Study -> results of the search that this one starts from: of its study of the same name, or of its only study.

    Raises InputError where the folder holds no search, lacks a study, was ranked by another metric, or has no trained
    trial inside this search's space.
    """
    if search.warm_start is None:
        return {}
    folder = Path(search.warm_start)
    other = journal.load_folder(folder)
    if other.metric != search.metric:
        raise InputError(f"warm_start: {folder} was ranked by {other.metric}, this search by {search.metric}")
    results = [result for result in collect(other, journal.read(folder)) if not result.trial.repeat]
    names, by_study = [study.name for study in studies(other)], {}
    for study in studies(search):
        name = study.name if study.name in names else names[0] if len(names) == 1 else None
        if name is None:
            raise InputError(f"warm_start: {folder} has no study {study.name}; it has {', '.join(names)}")
        usable = [replace(result, trial=replace(result.trial, study=study.name)) for result in results
                  if result.trial.study == name and result.status is not TrialStatus.FAILED
                  and inside(search, result.trial.drawn)]
        if not any(result.good for result in usable):
            raise InputError(f"warm_start: no trained trial of {folder}'s study {name} lies inside this search's space")
        by_study[study.name] = usable
    return by_study


def all_trials(search: Search) -> list[Trial]:
    """All trials, without repeats, of a search that does not learn from results, in the order in which they start."""
    queue = TrialQueue(search, [])
    while (trial := queue.next()) is not None:
        queue.end(trial.key, TrialStatus.FAILED)  # failed trials are not repeated
    return list(queue.trials.values())
