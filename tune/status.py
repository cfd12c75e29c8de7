"""Show the state of a search, from its files: running, interrupted or finished.

    python -m tune.status runs/search-demo
    python -m tune.status runs/search-demo --every 10        # again every 10 seconds, until Ctrl-C

Prints a line per study: its trials by status, the best trial so far, how many trials reached each rung, and the epochs
trained, of the epochs that all trials would take without early stopping.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error
from nulsq.files import is_locked
from nulsq.text import aligned, duration
from tune.space import Search, expected_epochs, full_epochs, rungs, studies
from tune.store import journal
from tune.store.directory import ARRAY, FINISHED, trial_directory
from tune.store.results import TrialResult, collect, ranked
from tune.store.status import SearchStatus, TrialStatus

STATUSES = (TrialStatus.FINISHED, TrialStatus.STOPPED, TrialStatus.RUNNING, TrialStatus.WAITING, TrialStatus.DIVERGED,
            TrialStatus.FAILED)
COLUMNS = ("study", *STATUSES, "best", "reached rungs", "epochs")
LEFT = [i for i, name in enumerate(COLUMNS) if name in ("study", "best", "reached rungs")]


def table(search: Search, results: list[TrialResult], seconds: float, *, running: bool) -> str:
    """The table and a summary line; `seconds`: how long the search has run so far."""
    lines, trained, most, left, full = [list(COLUMNS)], 0, 0, 0.0, full_epochs(search)
    array = (search.directory / ARRAY).is_dir()  # its trials are not stopped early
    for study in studies(search):
        epochs = full[study.name]
        own = [result for result in results if result.trial.study == study.name]
        first = [result for result in own if not result.trial.repeat]
        repeats = search.finalists * search.repeats
        counts = {status: sum(result.status is status for result in own) for status in STATUSES}
        counts[TrialStatus.WAITING] += max(0, search.trials - len(first)) + max(0, repeats - (len(own) - len(first)))
        best = next((result for result in ranked(own, study.name, search.mode) if result.good), None)
        reached = [f"{rung}: {sum(result.epochs >= rung for result in first)}"
                   for rung in [*rungs(epochs, search.grace, search.reduction), epochs]]
        study_trained, study_most = sum(result.epochs for result in own), (search.trials + repeats) * epochs
        if counts[TrialStatus.WAITING] or counts[TrialStatus.RUNNING]:
            planned = search.trials * epochs if array else expected_epochs(search, epochs)
            left += max(0.0, planned + repeats * epochs - study_trained)
        trained, most = trained + study_trained, most + study_most
        lines.append([study.name, *map(str, counts.values()),
                      f"{best.score:.2f} (trial {best.trial.number}, epoch {best.epochs})" if best else "-",
                      "  ".join(reached), f"{study_trained}/{study_most}"])
    summary = f"{trained} of at most {most} epochs" + (f" in {duration(seconds)}" if seconds else "")
    if trained and left:
        timed = running and seconds  # the time of an array's tasks is not recorded
        summary += f", about {duration(seconds / trained * left)} left" if timed else \
            f", about {round(left)} epochs left"
    return "\n".join([*aligned(lines, left=LEFT), summary])


def elapsed(events: list[dict[str, Any]], *, running: bool = False) -> float:
    """Seconds that the search has run, over all its sessions."""
    parts = journal.sessions(events)
    seconds = sum(part[-1]["time"] - part[0]["time"] for part in parts)
    if running and parts and parts[-1][-1]["event"] != "pause":
        seconds += time.time() - parts[-1][-1]["time"]
    return seconds


def is_running(folder: Path) -> bool:
    """Whether a process holds the search's lock, or a task of its array the lock of a trial."""
    trials = journal.read(folder) if (folder / ARRAY).is_dir() else []
    return any(is_locked(path / "lock")
               for path in (folder, *(trial_directory(folder, trial.key) for trial in trials)))


def search_status(folder: Path, running: bool) -> SearchStatus:
    if running:
        return SearchStatus.RUNNING
    return SearchStatus.FINISHED if (folder / FINISHED).is_file() else SearchStatus.INTERRUPTED


def describe(folder: Path) -> str:
    """The status of a search and its table. Raises InputError for a folder that holds no search."""
    search = journal.load_folder(folder)
    running = is_running(folder)
    words = str(search_status(folder, running))
    if words == SearchStatus.INTERRUPTED:
        words = "not finished, no task of its array runs" if (folder / ARRAY).is_dir() else \
            f"{words}: the same command continues it"
    results = collect(search, journal.read(folder))
    seconds = elapsed(journal.events(folder), running=running)
    return f"{folder}: {words}\n{table(search, results, seconds, running=running)}"


def parser() -> Parser:
    parser = Parser(prog="python -m tune.status", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a search, such as runs/search-demo")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="show it again after this many seconds")
    return parser


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
