"""What ran when and where, and what it would have cost without early stopping.

    events.jsonl          start, result, end, error and retry of trials; a session each time the command started
    code.txt of the runs  versions, machine                    metrics.jsonl   seconds of each epoch

A search that was interrupted for a night did not run for that night: times here are counted over the sessions, with
the gaps between them taken out. A session ends with its last event, since what is killed cannot say so.
"""

import re
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tune.report.findings import Findings
from tune.store import journal
from tune.store.results import TrialResult
from tune.store.status import TrialStatus


@dataclass
class Span:
    """A trial on a machine, from its start (or its start again) to its end; in seconds that the search ran."""

    key: str
    begin: float
    end: float
    lane: int = 0  # trials side by side


@dataclass
class History:
    """A search's time: sessions as (begin, end) since the epoch, and what ran in them."""

    sessions: list[tuple[float, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(end - begin for begin, end in self.sessions)

    @property
    def lanes(self) -> int:
        return 1 + max((span.lane for span in self.spans), default=-1)

    @property
    def breaks(self) -> list[float]:
        """Where one session follows another, on the clock that runs only in sessions."""
        found, passed = [], 0.0
        for begin, end in self.sessions[:-1]:
            passed += end - begin
            found.append(passed)
        return found


def history(findings: Findings) -> History:
    """Empty for a search without events."""
    return of_events(journal.events(findings.folder))


def of_events(events: list[dict[str, Any]]) -> History:
    made, passed = History(), 0.0
    for part in journal.sessions(sorted(events, key=lambda event: event["time"])):
        begin, end = part[0]["time"], part[-1]["time"]
        made.sessions.append((begin, end))
        made.spans += _spans(part, begin - passed)
        passed += end - begin
    _side_by_side(made.spans)
    return made


def _spans(events, zero) -> list[Span]:
    """What ran in one session. A trial without an end was cut off with it."""
    done, running = [], {}
    for event in events:
        key, now = event.get("key"), event["time"] - zero
        if key is None:
            continue
        if event["event"] == "start" and key in running:  # started again without a word about its end
            done.append(running.pop(key))
        running.setdefault(key, Span(key, now, now)).end = now
        if event["event"] in ("end", "error", "retry"):
            done.append(running.pop(key))
    last = events[-1]["time"] - zero
    for span in running.values():
        span.end = last
    return done + list(running.values())


def _side_by_side(spans: list[Span]) -> None:
    """Give each span the first lane that is free when it begins."""
    free: list[float] = []
    for span in sorted(spans, key=lambda span: span.begin):
        span.lane = next((i for i, until in enumerate(free) if until <= span.begin), len(free))
        free[span.lane:span.lane + 1] = [span.end]


# ---- where


@dataclass
class Places:
    """How many trials ran on which machine, with which code and packages."""

    machines: Counter = field(default_factory=Counter)
    code: Counter = field(default_factory=Counter)
    packages: Counter = field(default_factory=Counter)


def places(findings: Findings) -> Places:
    """From each run's code.txt; a trial that was continued elsewhere counts at each place."""
    found = Places()
    for row in findings.rows:
        file = row.path / "code.txt"
        blocks = re.split(r"(?m)^(?=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  )", file.read_text()) if file.is_file() else []
        lines = [[line.strip() for line in block.splitlines()] for block in blocks if block.strip()]
        lines = [block for block in lines if len(block) >= 3]
        found.code.update({block[0].split("  ", 1)[-1] for block in lines})
        found.packages.update({block[1] for block in lines})
        found.machines.update({block[2] for block in lines})
    return found


# ---- what early stopping saved


@dataclass
class Saving:
    """Seconds of training, repeats aside: spent, and estimated for all trials to their end."""

    spent: float
    whole: float
    repeats: float

    @property
    def share(self) -> float:
        return 1 - self.spent / self.whole if self.whole else 0.0


def saving(findings: Findings) -> Saving:
    """The epochs that a trial was spared are taken to last as long as its own (of one that has none, as its study's
    median)."""
    first = [row for row in findings.rows if not row.trial.repeat]
    paces = {study.name: statistics.median([_pace(row) for row in first if row.trial.study == study.name
                                            and row.epochs] or [0.0]) for study in findings.studies}
    whole = 0.0
    for row in first:
        missing = 0 if row.status is TrialStatus.DIVERGED else findings.full[row.trial.study] - row.epochs
        whole += row.seconds + max(0, missing) * (_pace(row) if row.epochs else paces[row.trial.study])
    return Saving(sum(row.seconds for row in first), whole,
                  sum(row.seconds for row in findings.rows if row.trial.repeat))


def _pace(row: TrialResult) -> float:
    return row.seconds / row.epochs
