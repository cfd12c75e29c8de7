"""Which trial is next: pure bookkeeping, no Ray. The search asks, and tells what became of trials.

    1. trials that were decided on and have not ended (the search was interrupted): they go on from their checkpoints
    2. the study with the fewest trials so far, in the order of the grid: studies take turns, so each gets its share of
       the cluster from the first minute, until each has its budget of trials
    3. once all trials of a study have ended: its finalists again with other seeds, studies taking turns as well
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from nulsq.errors import InputError
from tune.samplers import Observation, draw, inside, trial_of
from tune.space import Search, Trial, base_recipe, studies
from tune.store import journal
from tune.store.results import TrialResult, collect, finalists, ranked
from tune.store.status import TrialStatus


class TrialQueue:
    """The course of a search: its trials so far and what is known of each.

    Args:
        search: with every trial that --extend added.
        rows: the trials of its journal, as `tune.store.results.collect` reads them; those that failed are tried again.
        warm: rows of the search that this one starts from, by study.
    """

    def __init__(self, search: Search, rows: list[TrialResult], warm: dict[str, list[TrialResult]] | None = None):
        self.search = search
        self.studies = {study.name: study for study in studies(search)}
        self.trials = {row.trial.key: row.trial for row in rows}
        self.curves = {row.trial.key: list(row.curve) for row in rows}
        self.status = {row.trial.key: row.status if row.status.ended and row.status is not TrialStatus.FAILED
                       else TrialStatus.WAITING for row in rows}
        self.warm = {name: [] for name in self.studies} | (warm or {})
        self.begun: set[str] = set()  # what a process has taken since it was given out
        self.lost = Counter()  # how often what was given out was not

    def next(self) -> Trial | None:
        """The next trial, new or interrupted, now counted as running; None where there is none at the moment."""
        trial = self._interrupted() or self._drawn() or self._repeat()
        if trial is not None:
            self.trials[trial.key] = trial
            self.curves.setdefault(trial.key, [])
            self.status[trial.key] = TrialStatus.RUNNING
            self.begun.discard(trial.key)
        return trial

    @property
    def idle(self) -> bool:
        """Whether nothing runs; with no next trial the search is at its end."""
        return TrialStatus.RUNNING not in self.status.values()

    @property
    def finished(self) -> bool:
        return self.unfinished() == 0 and not (self._drawn() or self._repeat())

    def unfinished(self) -> int:
        """Trials that have begun, or wait to go on, and have not ended."""
        return sum(not status.ended for status in self.status.values())

    def result(self, key: str, epoch: int, score: float) -> None:
        """A trial's score after an epoch; one that is told again, after an interruption, is the same one."""
        self.curves[key][epoch - 1:epoch] = [score]

    def end(self, key: str, status: TrialStatus) -> None:
        self.status[key] = status

    def failure(self, key: str) -> TrialStatus:
        """The status of a trial that Tune gives up: failed; or waiting, to be given out again, where no process has
        taken it (the one that was to take it over has died), as often as the search says (`retries`)."""
        if key in self.begun:
            return TrialStatus.FAILED
        self.lost[key] += 1
        return TrialStatus.WAITING if self.lost[key] <= self.search.retries else TrialStatus.FAILED

    def told(self, study: str) -> list[Observation]:
        """What TPE hears: this study's trials, in their order, then those of the search that it starts from."""
        own = [Observation(trial.drawn, self.curves[key],
                           self.status[key] if self.status[key].ended else TrialStatus.RUNNING, trial.cost)
               for key, trial in self.trials.items()
               if trial.study == study and not trial.repeat and self.status[key] is not TrialStatus.FAILED]
        return own + [Observation(row.trial.drawn, row.curve, row.status, row.trial.cost) for row in self.warm[study]]

    def budget(self) -> int:
        """Trials that the search is made of, repeats included."""
        return len(self.studies) * (self.search.trials + self.search.finalists * self.search.repeats)

    def _interrupted(self):
        return next((self.trials[key] for key, status in self.status.items() if status is TrialStatus.WAITING), None)

    def _drawn(self):
        counts = self._counts()
        name = min(counts, key=counts.get)
        if counts[name] >= self.search.trials:
            return None
        warm = [row.trial.drawn for row in ranked(self.warm[name], name, self.search.mode)
                if row.good][:self.search.warm_best]
        drawn, source = draw(self.search, name, counts[name], self.told(name), warm)
        return trial_of(self.search, name, self.studies[name].overrides, counts[name], drawn, source)

    def _repeat(self):
        missing = []
        for name, own in self._finalists().items():
            done = {(trial.number, trial.repeat) for trial in self.trials.values() if trial.study == name}
            lacks = [(repeat, finalist.rows[0].trial) for repeat in range(1, self.search.repeats + 1)
                     for finalist in own if (finalist.rows[0].trial.number, repeat) not in done]
            missing += [(repeat, trial) for repeat, trial in lacks[:1]]
        if not missing:
            return None
        repeat, first = min(missing, key=lambda each: each[0])
        return again(self.search, first, repeat)

    def _finalists(self):
        """Of the studies whose trials have all ended."""
        if not self.search.repeats:
            return {}
        counts = self._counts()
        rows = [self.row(key) for key, trial in self.trials.items() if not trial.repeat]
        open_ = {row.trial.study for row in rows if not row.status.ended}
        return {name: own for name, own in finalists(self.search, rows).items()
                if name not in open_ and counts[name] >= self.search.trials}

    def _counts(self):
        counts = dict.fromkeys(self.studies, 0)
        for trial in self.trials.values():
            counts[trial.study] += not trial.repeat
        return counts

    def row(self, key: str) -> TrialResult:
        """A trial as the course knows it, without a look at its files."""
        curve = self.curves[key]
        return TrialResult(self.trials[key], self.status[key], len(curve), curve[-1] if curve else float("nan"),
                           curve, 0.0, Path(key))


def again(search: Search, first: Trial, repeat: int) -> Trial:
    """A finalist with another seed, run.seed + `repeat`; everything else as it was."""
    seed = base_recipe(search, first.overrides).run.seed + repeat
    return replace(first, overrides=first.overrides | {"run.seed": seed}, source="repeat", repeat=repeat)


def warm_rows(search: Search) -> dict[str, list[TrialResult]]:
    """The rows of the search that this one starts from: those of the study of the same name, or of its only study.

    Raises InputError where the folder holds no search, no such study, another metric or draws outside of this space.
    """
    if search.warm_start is None:
        return {}
    folder = Path(search.warm_start)
    other = journal.load_folder(folder)
    if other.metric != search.metric:
        raise InputError(f"warm_start: {folder} was ranked by {other.metric}, this search by {search.metric}")
    rows = [row for row in collect(other, journal.read(folder)) if not row.trial.repeat]
    theirs, found = [study.name for study in studies(other)], {}
    for study in studies(search):
        name = study.name if study.name in theirs else theirs[0] if len(theirs) == 1 else None
        if name is None:
            raise InputError(f"warm_start: {folder} has no study {study.name}; it has {', '.join(theirs)}")
        found[study.name] = [replace(row, trial=replace(row.trial, study=study.name)) for row in rows
                             if row.trial.study == name and row.status is not TrialStatus.FAILED
                             and inside(search, row.trial.drawn)]
        if not any(row.good for row in found[study.name]):
            raise InputError(f"warm_start: no trained trial of {folder}'s study {name} lies inside of this space")
    return found


def listed(search: Search) -> list[Trial]:
    """All trials of a search that looks at no results, in the order in which they start."""
    course = TrialQueue(search, [])
    while (trial := course.next()) is not None:
        course.end(trial.key, TrialStatus.FAILED)  # so that there is nothing to repeat
    return list(course.trials.values())
