"""Interleaved timing: both sides of a ratio in one run, round by round; rows against their targets; common options.

A machine's speed drifts by more than what is measured here, so a ratio is taken within each round, where its two sides
ran one after the other; what is reported is the median of the rounds' ratios and their quartiles.
"""

import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nulsq.errors import InputError, Parser
from nulsq.training.memory import keep_freed_memory


def add_options(parser: Parser, rounds: int | None, devices: tuple[str, ...] = ("cpu",)) -> None:
    """What every measurement can be told; `rounds` is the default, None: it has no rounds."""
    if len(devices) > 1:
        parser.add_argument("--device", choices=devices, default=devices[0], help="(%(default)s)")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, after everything before has run."""
    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    return clock


def begin(arguments) -> torch.device:
    """Threads and memory as they are asked for and as the trainer has them; says on what machine this is. The device.

    Raises InputError for a device that is not there.
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


def interleaved(sides: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2, repeat: int = 1,
                clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of `repeat` calls of each side in each round; every side once a round, in turn."""
    for _ in range(warm_up):
        for run in sides.values():
            run()
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            began = clock()
            for _ in range(repeat):
                run()
            found[name].append(clock() - began)
    return found


def ratios(times: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median and both quartiles of the rounds' ratios."""
    each = [a / b for a, b in zip(times, base, strict=True)]
    if len(each) < 2:
        return each[0], each[0], each[0]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return middle, low, high


def row(name: str, bits: int | None, setting: str, ratio: float, target: float | None, **more) -> dict:
    """One line of a table and of the JSON; `met` is None where the row has no target."""
    return {"name": name, "bits": bits, "setting": setting, "ratio": round(ratio, 4), "target": target,
            "met": None if target is None else ratio <= target, **more}


def timed_row(name: str, bits: int | None, setting: str, times: list[float], base: list[float],
              target: float | None, **more) -> dict:
    middle, low, high = ratios(times, base)
    return row(name, bits, setting, middle, target, quartiles=[round(low, 4), round(high, 4)],
               milliseconds=round(1e3 * statistics.median(times), 3),
               base_milliseconds=round(1e3 * statistics.median(base), 3), rounds=len(times), **more)


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| what | bits | setting | ratio | quartiles | target | met | ms / base ms |", "|---" * 8 + "|"]
    for each in rows:
        quartiles = "{:.2f} - {:.2f}".format(*each["quartiles"]) if "quartiles" in each else ""
        clock = f"{each['milliseconds']:.1f} / {each['base_milliseconds']:.1f}" if "milliseconds" in each else ""
        target = "" if each["target"] is None else f"{each['target']:g}"
        met = {None: "", True: "yes", False: "no"}[each["met"]]
        lines.append(f"| {each['name']} | {each['bits'] or ''} | {each['setting']} | {each['ratio']:.3f} | "
                     f"{quartiles} | {target} | {met} | {clock} |")
    return "\n".join(lines)


def show(rows: list[dict]) -> None:
    """Print them as further lines of a table whose head is out already."""
    print(*table(rows).splitlines()[2:], sep="\n", flush=True)


def write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        path.write_text("[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n")


def report(found: dict, path: Path | None) -> None:
    """Print what a proof found, and write it to the file if there is one."""
    text = json.dumps(found, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def machine() -> str:
    """What the numbers depend on, in one line."""
    try:
        model = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{model}, {torch.get_num_threads()} of {os.cpu_count()} cores, Python {platform.python_version()}, " \
           f"torch {torch.__version__}"
