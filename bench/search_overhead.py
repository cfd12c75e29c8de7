"""What a search costs beside its trials: time in which none computes, a trial's start, memory beside the workers.

    python -m bench.search_overhead                                    # 8 trials of a minute, two at a time
    python -m bench.search_overhead configs/search/curves.yaml trials=4 dir=runs/overhead
    python -m bench.search_overhead --folder runs/search-demo          # of a search that has run: no memory

Times come from the search's events.jsonl: a trial computes from its first step (the arrival of its first result less
the seconds of that epoch) to its last result. The clock starts with the first trial, when the cluster is up.

    idle       share of the search in which no trial computed, target 0.10
    slots      share of all places' time without a trial that computes (nothing is asked of it)
    start      seconds from the decision for a trial to its first step, median and worst, target 8
    memory     proportional set size of everything beside the trials' own processes, per trial at once, target 0.3 GB
"""

import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

from bench.timing import machine, report, scratch
from nulsq.errors import InputError, Parser, exit_on_input_error
from tune.store import journal

DEFAULT = ["configs/search/curves.yaml", "trials=4"]
TARGETS = {"idle": 0.10, "start_median": 8.0, "memory_gb_per_trial": 0.3}


def times_of(events: list[dict], places: int) -> dict[str, float]:
    """Idle shares and start times of a search's one session."""
    starts, firsts, spans = {}, {}, []
    for event in events:
        if event["event"] == "start":
            starts[event["key"]] = event["time"]
        elif event["event"] == "result" and "seconds" in event:
            began = event["time"] - event["seconds"]
            firsts.setdefault(event["key"], began)
            spans.append((began, event["time"]))
    if not spans:
        raise InputError("no trial of this search has reported an epoch")
    first, last = min(starts.values()), max(end for _, end in spans)
    waits = [firsts[key] - starts[key] for key in firsts]
    busy = sum(end - begin for begin, end in union(spans))
    return {"seconds": round(last - first, 1), "trials": len(firsts),
            "trial_seconds": round(statistics.median(_durations(events, firsts)), 1),
            "idle": round(1 - busy / (last - first), 4),
            "slots": round(1 - sum(end - begin for begin, end in spans) / (last - first) / places, 4),
            "start_median": round(statistics.median(waits), 2), "start_worst": round(max(waits), 2)}


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals that do not overlap and cover the same time."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def _durations(events, firsts):
    last = {event["key"]: event["time"] for event in events if event["event"] == "result"}
    return [last[key] - firsts[key] for key in firsts]


class Memory(threading.Thread):
    """Looks at the memory of a process and all that it has started, once in two seconds, until it ends."""

    def __init__(self, process: subprocess.Popen, places: int):
        super().__init__(daemon=True)
        self.process, self.places, self.seen = process, places, []

    def run(self):
        while True:
            try:
                self.process.wait(2.0)
                return
            except subprocess.TimeoutExpired:
                trials, beside = 0, 0.0
                for pid in _tree(self.process.pid):
                    name = _read(f"/proc/{pid}/cmdline").replace("\0", " ")
                    trial = name.startswith(("ray::ImplicitFunc", "ray::run"))
                    trials += trial
                    beside += 0 if trial else _pss(pid)
                if trials:
                    self.seen.append((trials, beside))

    def per_trial(self) -> float | None:
        """GB, at the median of the moments at which all places were taken."""
        full = [beside for trials, beside in self.seen if trials >= self.places]
        return round(statistics.median(full) / self.places / 2**30, 3) if full else None


def _tree(pid):
    """A process and its descendants; Ray's own are in sessions of their own but keep their parents."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _read(folder / "stat").rpartition(")")[2].split()
        if fields:
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += parents.get(found[-1], [])
    return found


def _pss(pid):
    line = next((line for line in _read(f"/proc/{pid}/smaps_rollup").splitlines() if line.startswith("Pss:")), "")
    return int(line.split()[1]) * 1024 if line else 0


def _read(path):
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


def parser() -> Parser:
    made = Parser(prog="python -m bench.search_overhead", description=__doc__)
    made.add_argument("search", nargs="*", default=DEFAULT, metavar="SEARCH key=value",
                      help="what tune.search is told (%(default)s), in a scratch folder unless dir is among it")
    made.add_argument("--folder", type=Path, metavar="DIR", help="measure a search that has run")
    made.add_argument("--places", type=int, default=len(os.sched_getaffinity(0)),
                      help="trials at once (%(default)s: the cores)")
    made.add_argument("--json", type=Path, help="write what was found to this file")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    if arguments.folder is not None:
        journal.load_folder(arguments.folder)  # says so where it is none
        found = times_of(journal.events(arguments.folder), arguments.places)
    else:
        with scratch("search-overhead-") as folder:
            given = [each.partition("=")[2] for each in arguments.search if each.startswith("dir=")]
            there = Path(given[0]) if given else folder / "search"
            command = [sys.executable, "-m", "tune.search", *arguments.search, f"dir={there}",
                       f"concurrent={arguments.places}"]
            process = subprocess.Popen(command)
            memory = Memory(process, arguments.places)
            memory.start()
            if process.wait():
                return process.returncode
            found = times_of(journal.events(there), arguments.places)
            found["memory_gb_per_trial"] = memory.per_trial()
    print(machine())
    met = {name: found[name] <= target for name, target in TARGETS.items() if found.get(name) is not None}
    report(found | {"targets": TARGETS, "met": met}, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
