"""Which trial ran when and where.

    events.jsonl          start, result, end, error and retry of trials; session: the command started
    code.txt of the runs  versions and machine

A search that was interrupted for a night did not run during that night. Times are therefore counted over the sessions,
without the gaps between them. A session ends with its last event, because a killed process cannot record its end.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tune.report.findings import Findings
from tune.store import journal


@dataclass
class Span:
    """A trial on a machine, from its start (or restart) to its end, in seconds of the search's running time."""

    key: str
    begin: float
    end: float
    lane: int = 0  # trials that run at once have different lanes


@dataclass
class Timeline:
    """The sessions of a search as (begin, end) in Unix time, and the trials that ran in them."""

    sessions: list[tuple[float, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Running time of the search, over all sessions."""
        return sum(end - begin for begin, end in self.sessions)

    @property
    def lanes(self) -> int:
        """The largest number of trials that ran at once."""
        return 1 + max((span.lane for span in self.spans), default=-1)

    @property
    def interruptions(self) -> list[float]:
        """Times between two sessions, in seconds of the search's running time."""
        times, passed = [], 0.0
        for begin, end in self.sessions[:-1]:
            passed += end - begin
            times.append(passed)
        return times


def read_timeline(findings: Findings) -> Timeline:
    """From the events of the search; empty if there are none."""
    return from_events(journal.events(findings.folder))


def from_events(events: list[dict[str, Any]]) -> Timeline:
    timeline, passed = Timeline(), 0.0
    for session in journal.sessions(sorted(events, key=lambda event: event["time"])):
        begin, end = session[0]["time"], session[-1]["time"]
        timeline.sessions.append((begin, end))
        timeline.spans += _spans(session, begin - passed)
        passed += end - begin
    _assign_lanes(timeline.spans)
    return timeline


def _spans(session: list[dict[str, Any]], zero: float) -> list[Span]:
    """The trials of one session, with times relative to `zero`. A trial without an end ends with the session."""
    ended: list[Span] = []
    running: dict[str, Span] = {}
    for event in session:
        key, now = event.get("key"), event["time"] - zero
        if key is None:
            continue
        if event["event"] == "start" and key in running:  # restarted, its end was not recorded
            ended.append(running.pop(key))
        running.setdefault(key, Span(key, now, now)).end = now
        if event["event"] in ("end", "error", "retry"):
            ended.append(running.pop(key))
    for span in running.values():
        span.end = session[-1]["time"] - zero
    return ended + list(running.values())


def _assign_lanes(spans: list[Span]) -> None:
    """Give each span the first lane that is free when it begins."""
    free_from: list[float] = []  # by lane
    for span in sorted(spans, key=lambda span: span.begin):
        span.lane = next((i for i, time in enumerate(free_from) if time <= span.begin), len(free_from))
        free_from[span.lane:span.lane + 1] = [span.end]


# ---- where


@dataclass
class Environments:
    """Number of trials by machine, by code version and by package versions."""

    machines: Counter[str] = field(default_factory=Counter)
    code: Counter[str] = field(default_factory=Counter)
    packages: Counter[str] = field(default_factory=Counter)


def read_environments(findings: Findings) -> Environments:
    """From the code.txt of each run. A trial that continued on another machine counts for both."""
    environments = Environments()
    for result in findings.results:
        file = result.path / "code.txt"
        blocks = re.split(r"(?m)^(?=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  )", file.read_text()) if file.is_file() else []
        entries = [[line.strip() for line in block.splitlines()] for block in blocks if block.strip()]
        entries = [lines for lines in entries if len(lines) >= 3]
        environments.code.update({lines[0].split("  ", 1)[-1] for lines in entries})
        environments.packages.update({lines[1] for lines in entries})
        environments.machines.update({lines[2] for lines in entries})
    return environments
