"""On this machine: validate first, then plain python for one process or torchrun for several.

torchrun makes 1 of every exit code of its ranks, so how a run ended is read from the run directory's outcome.json.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from nulsq import command_line
from nulsq.errors import InputError
from nulsq.run_directory import path_of, read_outcome

EXIT_CODES = {"finished": 0, "saved": 99, "diverged": 3}


def train(recipe: str, rest: list[str], nproc: int, *, show: bool = False) -> int:
    """Train in `nproc` processes; the exit code of `python -m nulsq.train`, whoever started the ranks."""
    if nproc < 1:
        raise InputError(f"--nproc = {nproc}, allowed: at least 1")
    _, parsed = command_line.parse(command_line.parser("python -m launch local train", ""), [recipe, *rest])
    own = [sys.executable, "-m", "nulsq.train", recipe, *rest]
    command = own if nproc == 1 else torchrun(nproc) + own[2:]
    if show:
        print(shlex.join(command))
        return 0
    checked = subprocess.run([*own, f"--dry-run={nproc}"], stdout=subprocess.DEVNULL)
    if checked.returncode:
        return checked.returncode
    return _run(command, nproc, path_of(parsed))


def search(file: str, rest: list[str], *, show: bool = False) -> int:
    command = [sys.executable, "-m", "tune.search", file, *rest]
    if show:
        print(shlex.join(command))
        return 0
    return subprocess.run(command).returncode  # it validates by itself before it starts Ray


def torchrun(nproc: int) -> list[str]:
    """The torchrun command of one node; its meeting point is on loopback, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(nproc),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m"]


def _run(command, nproc, run):
    environment = dict(os.environ)
    if nproc > 1:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    before = _written(run)
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the terminal sends it to the ranks too: they save and end, wait for them
            continue
    if nproc > 1 and _written(run) != before:
        return EXIT_CODES.get(read_outcome(run)["outcome"], code or 1)
    return code


def _written(run: Path):
    file = run / "outcome.json"
    return file.stat().st_mtime_ns if file.is_file() else None
