"""The cost of a search in addition to its trials: idle time, the start of a trial, memory of other processes.

    python -m bench.search_overhead                                    # 8 trials of a minute, two at a time
    python -m bench.search_overhead configs/search/curves.yaml trials=4 dir=runs/overhead
    python -m bench.search_overhead --folder runs/search-demo          # a search that has finished; without memory

Times come from the search's events.jsonl. A trial computes from its first step (the time of its first result minus the
seconds of that epoch) to its last result. The clock starts with the first trial, when the cluster is up.

    idle       share of the search's time in which no trial computed; target 0.10
    slots      the idle share of each place for concurrent trials, averaged over the places; no target
    start      seconds from the decision to start a trial to its first step, median and worst; target 8
    memory     proportional set size of all processes except those of trials, per concurrent trial; target 0.3 GB
"""

import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from bench.timing import machine, report, scratch
from nulsq.errors import InputError, Parser, exit_on_input_error
from tune.store import journal

DEFAULT = ["configs/search/curves.yaml", "trials=4"]
TARGETS = {"idle": 0.10, "start_median": 8.0, "memory_gb_per_trial": 0.3}


def times_of(events: list[dict[str, Any]], places: int) -> dict[str, Any]:
    """Idle shares and start times of a search that ran in one session, with `places` trials at a time."""
    starts: dict[str, float] = {}
    firsts: dict[str, float] = {}  # when each trial began its first step
    spans = []
    for event in events:
        if event["event"] == "start":
            starts[event["key"]] = event["time"]
        elif event["event"] == "result" and "seconds" in event:
            begin = event["time"] - event["seconds"]
            firsts.setdefault(event["key"], begin)
            spans.append((begin, event["time"]))
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
    """Disjoint intervals that cover the same time."""
    disjoint: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if disjoint and begin <= disjoint[-1][1]:
            disjoint[-1] = disjoint[-1][0], max(disjoint[-1][1], end)
        else:
            disjoint.append((begin, end))
    return disjoint


def _durations(events: list[dict[str, Any]], firsts: dict[str, float]) -> list[float]:
    last = {event["key"]: event["time"] for event in events if event["event"] == "result"}
    return [last[key] - firsts[key] for key in firsts]


class Memory(threading.Thread):
    """Samples the memory of a process and its descendants every two seconds until it ends."""

    def __init__(self, process: subprocess.Popen, places: int):
        super().__init__(daemon=True)
        self.process, self.places = process, places
        self.samples: list[tuple[int, float]] = []  # (trials, bytes of all other processes)

    def run(self) -> None:
        while True:
            try:
                self.process.wait(2.0)
                return
            except subprocess.TimeoutExpired:
                trials, others = 0, 0.0
                for pid in _tree(self.process.pid):
                    name = _read(f"/proc/{pid}/cmdline").replace("\0", " ")
                    trial = name.startswith(("ray::ImplicitFunc", "ray::run"))
                    trials += trial
                    others += 0 if trial else _pss(pid)
                if trials:
                    self.samples.append((trials, others))

    def per_trial(self) -> float | None:
        """GB of all other processes per trial: the median over the samples in which all places were taken."""
        samples = [others for trials, others in self.samples if trials >= self.places]
        return round(statistics.median(samples) / self.places / 2**30, 3) if samples else None


def _tree(pid: int) -> list[int]:
    """A process and its descendants. (Ray's processes have their own sessions but keep their parents.)"""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _read(folder / "stat").rpartition(")")[2].split()
        if fields:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    tree, todo = [], [pid]
    while todo:
        tree.append(todo.pop())
        todo += children.get(tree[-1], [])
    return tree


def _pss(pid: int) -> int:
    """Proportional set size in bytes."""
    line = next((line for line in _read(f"/proc/{pid}/smaps_rollup").splitlines() if line.startswith("Pss:")), "")
    return int(line.split()[1]) * 1024 if line else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # the process has ended
        return ""


def parser() -> Parser:
    parser = Parser(prog="python -m bench.search_overhead", description=__doc__)
    parser.add_argument("search", nargs="*", default=DEFAULT, metavar="SEARCH key=value",
                        help="arguments of tune.search (%(default)s); without dir= in a temporary folder")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="measure a search that has finished")
    parser.add_argument("--places", type=int, default=len(os.sched_getaffinity(0)),
                        help="trials at the same time (%(default)s, the number of cores)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    if arguments.folder is not None:
        journal.load_folder(arguments.folder)  # raises InputError if it is not the folder of a search
        result = times_of(journal.events(arguments.folder), arguments.places)
    else:
        with scratch("search-overhead-") as folder:
            directories = [word.partition("=")[2] for word in arguments.search if word.startswith("dir=")]
            search = Path(directories[0]) if directories else folder / "search"
            command = [sys.executable, "-m", "tune.search", *arguments.search, f"dir={search}",
                       f"concurrent={arguments.places}"]
            process = subprocess.Popen(command)
            memory = Memory(process, arguments.places)
            memory.start()
            if process.wait():
                return process.returncode
            result = times_of(journal.events(search), arguments.places)
            result["memory_gb_per_trial"] = memory.per_trial()
    print(machine())
    met = {name: result[name] <= target for name, target in TARGETS.items() if result.get(name) is not None}
    report(result | {"targets": TARGETS, "met": met}, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
