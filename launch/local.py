"""Launches on this machine: checks first, then runs plain Python for one process or torchrun for several.

torchrun turns every non-zero exit code of its ranks into 1, so the run's outcome.json decides the exit code.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from launch.job_spec import recipe_of, run_check
from nulsq.errors import InputError
from nulsq.run.directory import path_of
from nulsq.run.status import FILE, RunStatus, read_status

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def train(recipe: str, rest: list[str], nproc: int, *, show: bool = False) -> int:
    """Train in `nproc` processes. Returns the exit code of `python -m nulsq.train`, also for several processes."""
    if nproc < 1:
        raise InputError(f"--nproc = {nproc}, allowed: at least 1")
    parsed = recipe_of([recipe, *rest])
    plain = [sys.executable, "-m", "nulsq.train", recipe, *rest]
    command = plain if nproc == 1 else torchrun(nproc) + plain[2:]
    if show:
        print(shlex.join(command))
        return 0
    run_check([*plain[1:], f"--dry-run={nproc}"])
    if nproc == 1:
        return run(command)
    before = _time_written(path_of(parsed))
    code = run(command, {"GLOO_SOCKET_IFNAME": "lo",
                         "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc))})
    if code and _time_written(path_of(parsed)) != before:
        status = read_status(path_of(parsed))
        if status in (RunStatus.SAVED, RunStatus.DIVERGED):
            return status.exit_code
    return code


def search(file: str, rest: list[str], *, show: bool = False) -> int:
    """Search. The search checks its settings itself before it starts Ray."""
    command = [sys.executable, "-m", "tune.search", file, *rest]
    if show:
        print(shlex.join(command))
        return 0
    return run(command)


def torchrun(nproc: int, *flags: str) -> list[str]:
    """The torchrun command of one node. Its ranks rendezvous on loopback, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(nproc),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
            "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *flags, "-m"]


def run(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a command to its end and return its exit code. Signals are forwarded, and the command's end is awaited.

    The child has a session of its own. Otherwise it would get Ctrl-C twice, from the terminal and from here, and a
    second signal means to stop at once. `environment` does not replace variables that are set already.
    """
    process = subprocess.Popen(command, env=(environment or {}) | os.environ, start_new_session=True)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in FORWARDED}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _time_written(run: Path) -> int | None:
    """When the run's outcome was written last, in nanoseconds."""
    file = run / FILE
    return file.stat().st_mtime_ns if file.is_file() else None
