"""Where a search stands, from another terminal, from its files: running, interrupted or finished.

    python -m tune.status runs/search-demo
    python -m tune.status runs/search-demo --every 10        # again and again, until Ctrl-C

A line per study: trials by state, the best so far, how many trials reached each rung, epochs spent of the budget that
all trials to their end would cost.
"""

import contextlib
import sys
import time
from pathlib import Path

from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error
from nulsq.files import is_locked
from nulsq.text import aligned, duration
from tune.ray_backend.trial_protocol import directory
from tune.space import Search, expected_epochs, full_epochs, rungs, studies
from tune.store import journal
from tune.store.directory import ARRAY
from tune.store.results import TrialResult, collect, ranked
from tune.store.status import SearchStatus, TrialStatus

STATUSES = (TrialStatus.FINISHED, TrialStatus.STOPPED, TrialStatus.RUNNING, TrialStatus.WAITING, TrialStatus.DIVERGED,
            TrialStatus.FAILED)
COLUMNS = ("study", *STATUSES, "best", "reached rungs", "epochs")


def table(search: Search, rows: list[TrialResult], seconds: float, *, running: bool) -> str:
    """The table, and a line that sums it up; `seconds` that the search has run so far."""
    lines, spent, most, left, full = [list(COLUMNS)], 0, 0, 0.0, full_epochs(search)
    array = (search.directory / ARRAY).is_dir()  # its trials are not stopped early
    for study in studies(search):
        epochs = full[study.name]
        own = [row for row in rows if row.trial.study == study.name]
        first = [row for row in own if not row.trial.repeat]
        repeats = search.finalists * search.repeats
        counts = {status: sum(row.status is status for row in own) for status in STATUSES}
        counts[TrialStatus.WAITING] += max(0, search.trials - len(first)) + max(0, repeats - (len(own) - len(first)))
        best = next((row for row in ranked(own, study.name, search.mode) if row.good), None)
        reached = [f"{rung}: {sum(row.epochs >= rung for row in first)}"
                   for rung in [*rungs(epochs, search.grace, search.reduction), epochs]]
        used, whole = sum(row.epochs for row in own), (search.trials + repeats) * epochs
        if counts[TrialStatus.WAITING] or counts[TrialStatus.RUNNING]:
            planned = search.trials * epochs if array else expected_epochs(search, epochs)
            left += max(0.0, planned + repeats * epochs - used)
        spent, most = spent + used, most + whole
        lines.append([study.name, *map(str, counts.values()),
                      f"{best.score:.2f} (trial {best.trial.number}, epoch {best.epochs})" if best else "-",
                      "  ".join(reached), f"{used}/{whole}"])
    told = f"{spent} of at most {most} epochs" + (f" in {duration(seconds)}" if seconds else "")
    if spent and left:
        timed = running and seconds  # nobody has taken the time of an array
        told += f", about {duration(seconds / spent * left)} left" if timed else f", about {round(left)} epochs left"
    return "\n".join([*aligned(lines, left=(0, 7, 8)), told])


def elapsed(events: list[dict], *, running: bool = False) -> float:
    """Seconds that the search has run, over all its sessions."""
    parts = journal.sessions(events)
    seconds = sum(part[-1]["time"] - part[0]["time"] for part in parts)
    if running and parts and parts[-1][-1]["event"] != "pause":
        seconds += time.time() - parts[-1][-1]["time"]
    return seconds


def is_running(folder: Path) -> bool:
    """Whether a process holds the search's lock, or a task of its array that of a trial."""
    trials = journal.read(folder) if (folder / ARRAY).is_dir() else []
    return any(is_locked(path / "lock") for path in (folder, *(directory(folder, trial.key) for trial in trials)))


def search_status(folder: Path, running: bool) -> SearchStatus:
    if running:
        return SearchStatus.RUNNING
    return SearchStatus.FINISHED if (folder / "finished").is_file() else SearchStatus.INTERRUPTED


def describe(folder: Path) -> str:
    """The state of a search in words, and its table. Raises InputError for a folder that holds no search."""
    search = journal.load_folder(folder)
    running = is_running(folder)
    words = str(search_status(folder, running))
    if words == SearchStatus.INTERRUPTED:
        words = "not finished, no task of its array runs" if (folder / ARRAY).is_dir() else \
            f"{words}: the same command continues it"
    rows = collect(search, journal.read(folder))
    seconds = elapsed(journal.events(folder), running=running)
    return f"{folder}: {words}\n{table(search, rows, seconds, running=running)}"


def parser() -> Parser:
    made = Parser(prog="python -m tune.status", description=__doc__)
    made.add_argument("folder", type=Path, metavar="DIR", help="folder of a search, as runs/search-demo")
    made.add_argument("--every", type=float, metavar="SECONDS", help="show it again after so many seconds")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.every is not None and arguments.every <= 0:
        raise InputError(f"--every {arguments.every:g}, allowed: above 0")
    clear = "\x1b[H\x1b[2J" if arguments.every and sys.stdout.isatty() else ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            print(clear + describe(arguments.folder), flush=True)
            if not arguments.every:
                break
            time.sleep(arguments.every)
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
