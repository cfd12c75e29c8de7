"""On this machine: validate first, then plain python for one process or torchrun for several.

torchrun makes 1 of every exit code of its ranks, so how a run ended is read from the run directory's outcome.json.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from launch.work import checked, recipe_of
from nulsq.errors import InputError
from nulsq.run.directory import path_of
from nulsq.run.status import read_outcome

# What torchrun's 1 stands for. A run that finished may still fail in its evaluation: that 1 stays.
EXIT_CODES = {"saved": 99, "diverged": 3}
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(recipe: str, rest: list[str], nproc: int, *, show: bool = False) -> int:
    """Train in `nproc` processes; the exit code of `python -m nulsq.train`, whoever started the ranks."""
    if nproc < 1:
        raise InputError(f"--nproc = {nproc}, allowed: at least 1")
    parsed = recipe_of([recipe, *rest])
    own = [sys.executable, "-m", "nulsq.train", recipe, *rest]
    command = own if nproc == 1 else torchrun(nproc) + own[2:]
    if show:
        print(shlex.join(command))
        return 0
    checked([*own[1:], f"--dry-run={nproc}"])
    if nproc == 1:
        return run(command)
    before = _written(path_of(parsed))
    code = run(command, {"GLOO_SOCKET_IFNAME": "lo",
                         "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc))})
    if code and _written(path_of(parsed)) != before:
        return EXIT_CODES.get(read_outcome(path_of(parsed))["outcome"], code)
    return code


def search(file: str, rest: list[str], *, show: bool = False) -> int:
    """Search; it validates by itself before it starts Ray."""
    command = [sys.executable, "-m", "tune.search", file, *rest]
    if show:
        print(shlex.join(command))
        return 0
    return run(command)


def torchrun(nproc: int, *flags: str) -> list[str]:
    """The torchrun command of one node; its meeting point is on loopback, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(nproc),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
            "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *flags, "-m"]


def run(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a command to its end and return its exit code. Signals are passed on, once each, and its end awaited.

    The child has a session of its own: Ctrl-C in a terminal would otherwise reach it twice, from the terminal and
    from here, and a second signal means to stop at once. Variables that are set already stay as they are.
    """
    process = subprocess.Popen(command, env=(environment or {}) | os.environ, start_new_session=True)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in PASSED_ON}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _written(run: Path):
    file = run / "outcome.json"
    return file.stat().st_mtime_ns if file.is_file() else None
