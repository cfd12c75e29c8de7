"""The journal of a search: trials.jsonl, a line for every trial the moment it is decided on; events.jsonl, a line for
whatever happens to one. Appended, never rewritten: whatever is killed, what stands here stays.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from nulsq.config import load
from nulsq.errors import InputError
from nulsq.files import append_line, read_lines, repair_tail
from tune.space import Search, Trial

TRIALS, EVENTS = "trials.jsonl", "events.jsonl"


def append(folder: Path, trial: Trial) -> None:
    """Synced: a trial that has begun must not be drawn anew after a loss of power."""
    append_line(folder / TRIALS, dataclasses.asdict(trial) | {"time": round(time.time(), 3)}, sync=True)


def event(folder: Path, what: str, key: str | None = None, **more: Any) -> None:
    """`what`: session and pause (a command begins and ends), start, result, end, retry or error (of a trial)."""
    append_line(folder / EVENTS, {"time": round(time.time(), 3), "event": what, "key": key} | more)


def read(folder: Path) -> list[Trial]:
    """Every trial that was ever decided on, in that order."""
    return [Trial(**{name: value for name, value in line.items() if name != "time"})
            for line in read_lines(folder / TRIALS)]


def events(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / EVENTS)


def sessions(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The events of each time that the command ran, from its start to the last thing that it could write."""
    parts: list[list[dict[str, Any]]] = []
    for each in events:
        if each["event"] == "session" or not parts:
            parts.append([])
        parts[-1].append(each)
    return parts


def load_folder(folder: Path) -> Search:
    """The search of a folder, with the trials that --extend added, and `dir` and `recipe` where the folder is now.

    Raises InputError for a folder that holds no search.
    """
    if not (folder / "search.yaml").is_file():
        near = sorted(str(each.parent) for each in folder.parent.glob("*/search.yaml"))
        raise InputError(f"{folder} is not the folder of a search (no search.yaml)"
                         + (f"; there are {', '.join(near[:5])}" if near else ""))
    search = load(Search, folder / "search.yaml")
    return dataclasses.replace(search, dir=str(folder), recipe=str(folder / "recipe.yaml"),
                               trials=search.trials + extended(folder))


def extended(folder: Path) -> int:
    """Trials per study that --extend added."""
    file = folder / "extended"
    return int(file.read_text()) if file.is_file() else 0


def repair(folder: Path) -> None:
    """Drop a last line that a full disk or a loss of power cut off."""
    for name in (TRIALS, EVENTS):
        repair_tail(folder / name)
