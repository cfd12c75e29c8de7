"""The journal of a search, which is appended to and never rewritten, so that a crash loses nothing.

trials.jsonl has a line for every trial, written when the trial is decided on. events.jsonl has a line for everything
that happens to a trial.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from nulsq.config import load
from nulsq.errors import InputError
from nulsq.files import append_line, read_lines, repair_tail
from tune.space import Search, Trial

TRIALS, EVENTS, EXTENDED = "trials.jsonl", "events.jsonl", "extended"


def append(folder: Path, trial: Trial) -> None:
    """Record a trial, synced to disk: after a loss of power the same trial is continued, not another one started."""
    append_line(folder / TRIALS, dataclasses.asdict(trial) | {"time": round(time.time(), 3)}, sync=True)


def event(folder: Path, name: str, key: str | None = None, **details: Any) -> None:
    """Record an event: session or pause (a command begins or ends), or start, result, end, retry or error (of the trial
    `key`)."""
    append_line(folder / EVENTS, {"time": round(time.time(), 3), "event": name, "key": key} | details)


def read(folder: Path) -> list[Trial]:
    """Every trial of the search, in the order in which they were decided on."""
    return [Trial(**{name: value for name, value in line.items() if name != "time"})
            for line in read_lines(folder / TRIALS)]


def events(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / EVENTS)


def sessions(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The events of each session: from one start of the command to the last event before the next start."""
    parts: list[list[dict[str, Any]]] = []
    for event in events:
        if event["event"] == "session" or not parts:
            parts.append([])
        parts[-1].append(event)
    return parts


def load_folder(folder: Path) -> Search:
    """The search of a folder, with the trials that --extend added, and with `dir` and `recipe` in that folder, which
    may have been moved.

    Raises InputError for a folder that holds no search.
    """
    if not (folder / "search.yaml").is_file():
        others = sorted(str(file.parent) for file in folder.parent.glob("*/search.yaml"))
        raise InputError(f"{folder} is not the folder of a search (no search.yaml)"
                         + (f"; there are {', '.join(others[:5])}" if others else ""))
    search = load(Search, folder / "search.yaml")
    return dataclasses.replace(search, dir=str(folder), recipe=str(folder / "recipe.yaml"),
                               trials=search.trials + extended(folder))


def extended(folder: Path) -> int:
    """The number of trials per study that --extend added."""
    file = folder / EXTENDED
    return int(file.read_text()) if file.is_file() else 0


def repair(folder: Path) -> None:
    """Drop a last line that a full disk or a loss of power cut off."""
    for name in (TRIALS, EVENTS):
        repair_tail(folder / name)
