"""Interleaved timing, rows with targets, and the options that all measurements share.

A machine's speed drifts by more than the differences that are measured here. So both sides of a ratio run one after the
other in every round, and the result is the median and the quartiles of the rounds' ratios.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from nulsq.errors import InputError, Parser
from nulsq.text import markdown_table
from nulsq.training.memory import keep_freed_memory

Side = TypeVar("Side")
Row = dict[str, Any]  # a line of a table and of the JSON file, see `row`


def add_options(parser: Parser, rounds: int | None, devices: Sequence[str] = ("cpu",)) -> None:
    """Add the options of measurements. rounds: the default of --rounds; None: the measurement has no rounds."""
    if len(devices) > 1:
        parser.add_argument("--device", choices=devices, default=devices[0], help="(%(default)s)")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds,
                            help="times that every side is measured, in turn (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that first waits for everything queued on the device."""
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    return clock


def begin(arguments: argparse.Namespace) -> torch.device:
    """Set threads and memory as the trainer does, print the machine, and return the device.

    Raises InputError if the device is not available.
    """
    if getattr(arguments, "rounds", 1) < 1:
        raise InputError(f"--rounds {arguments.rounds}, allowed: 1 and more")
    device = torch.device(getattr(arguments, "device", "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here, allowed: cpu")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(machine())
    return device


def interleaved(sides: Mapping[Side, Callable[[], object]], rounds: int, warm_up: int = 2, repeat: int = 1,
                clock: Callable[[], float] = time.perf_counter) -> dict[Side, list[float]]:
    """Seconds that `repeat` calls of each side take in each round. Every round runs all sides in turn."""
    for _ in range(warm_up):
        for run in sides.values():
            run()
    seconds: dict[Side, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = clock()
            for _ in range(repeat):
                run()
            seconds[name].append(clock() - start)
    return seconds


def ratios(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios times / base."""
    values = [a / b for a, b in zip(times, base, strict=True)]
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def row(name: str, bits: int | None, setting: str, ratio: float, target: float | None, **columns: Any) -> Row:
    """A line of a table and of the JSON file; `met` is None if there is no target."""
    return {"name": name, "bits": bits, "setting": setting, "ratio": round(ratio, 4), "target": target,
            "met": None if target is None else ratio <= target, **columns}


def timed_row(name: str, bits: int | None, setting: str, times: Sequence[float], base: Sequence[float],
              target: float | None, **columns: Any) -> Row:
    """A row of the ratio times / base, with its quartiles and the median times."""
    middle, low, high = ratios(times, base)
    return row(name, bits, setting, middle, target, quartiles=[round(low, 4), round(high, 4)],
               milliseconds=round(1e3 * statistics.median(times), 3),
               base_milliseconds=round(1e3 * statistics.median(base), 3), rounds=len(times), **columns)


def target_cells(line: Row) -> list[str]:
    """The target and whether it is met, as cells of a table."""
    return ["" if line["target"] is None else f"{line['target']:g}", {None: "", True: "yes", False: "no"}[line["met"]]]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    cells = [["name", "bits", "setting", "ratio", "quartiles", "target", "met", "ms / base ms"]]
    for line in rows:
        quartiles = "{:.2f} - {:.2f}".format(*line["quartiles"]) if "quartiles" in line else ""
        times = f"{line['milliseconds']:.1f} / {line['base_milliseconds']:.1f}" if "milliseconds" in line else ""
        cells.append([line["name"], str(line["bits"] or ""), line["setting"], f"{line['ratio']:.3f}", quartiles,
                      *target_cells(line), times])
    return "\n".join(markdown_table(cells))


def show(rows: Sequence[Row]) -> None:
    """Print the rows as further lines of a table whose header is already printed."""
    print(*table(rows).splitlines()[2:], sep="\n", flush=True)


def write_json(path: Path | None, rows: Sequence[Row]) -> None:
    """Write the rows to a file, one a line, if there is a path."""
    if path is not None:
        path.write_text("[\n" + ",\n".join(json.dumps(line) for line in rows) + "\n]\n")


def report(result: dict[str, Any], path: Path | None) -> None:
    """Print a result as JSON, and write it to a file if there is a path."""
    text = json.dumps(result, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def machine() -> str:
    """The hardware and versions that a measurement depends on, in one line."""
    try:
        model = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{model}, {torch.get_num_threads()} of {os.cpu_count()} cores, Python {platform.python_version()}, " \
           f"torch {torch.__version__}"
