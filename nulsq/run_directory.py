"""The run directory: the only thing that evaluation, inspection and search results read.

    recipe.yaml    the resolved recipe          metrics.jsonl   a line per epoch
    code.txt       versions, environment        outcome.json    how the run ended, and whether to requeue
    checkpoints/   the newest two and the best  tensorboard/    the log
    test.json      accuracy on the test images, written by `nulsq.evaluate`
    oscillations.jsonl   a line per epoch: how many weights of each layer oscillate, how many are frozen; where the
                         recipe tracks them

One run at a time: `lock` is held while one trains. The same directory with the same recipe means resume; with
another recipe it is an error that names the settings.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from nulsq._version import __version__
from nulsq.config import Recipe, differences, load, to_yaml
from nulsq.errors import InputError

# Settings that may change between the parts of a run: they do not enter its numbers.
FREE = {"name", "run.dir", "run.root", "run.train_id", "run.device", "run.threads", "run.log_every", "data.loader",
        "data.workers", "data.patience", "run.save_every"}
TIMES = {"images_per_second", "wait_share", "seconds"}  # metrics that are the clock's, not the run's
UNFINISHED = ".unfinished"
METRICS, OSCILLATIONS = "metrics.jsonl", "oscillations.jsonl"
SNAPSHOT = "SNAPSHOT"  # beside a copy of the code: a line that says what it was taken from
LAUNCH = "launch"  # a batch job's script, logs and code: may be there before the run is
# Variables that change what a run computes with, or say which job it is part of; nothing that looks like a secret.
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_", "GLOO_", "NULSQ_", "TORCH", "PYTHONPATH",
               "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "RAY_ADDRESS", "RAY_JOB")
SECRETS = ("KEY", "TOKEN", "PASSWORD", "SECRET")
PACKAGES = ("torch", "torchvision", "timm", "pytorchcv", "numpy", "omegaconf", "ffcv", "numba", "ray")


def path_of(recipe: Recipe) -> Path:
    """Where the recipe's run lives: run.dir, or ROOT/NAME-TRAIN_ID."""
    if not (recipe.run.dir or recipe.name):
        raise InputError("the recipe has neither a name nor run.dir; load it with load_recipe, or set one")
    return Path(recipe.run.dir or Path(recipe.run.root) / f"{recipe.name}-{recipe.run.train_id}")


class RunDirectory:
    """A run directory that this process writes to. Rank 0 only; the others know its path."""

    def __init__(self, path: Path):
        self.path = path
        self._lock_file = None

    def start(self, recipe: Recipe) -> None:
        """Make the directory, or take it up, and lock it. Raises InputError where that cannot be."""
        path = self.path
        if (path / "recipe.yaml").is_file():
            _same_recipe(path, recipe)
        elif path.exists() and (not path.is_dir() or {each.name for each in path.iterdir()} - {LAUNCH}):
            raise InputError(f"run directory {path} exists and holds something else; choose another run.dir")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_file = lock(path, "training")
            if not (path / "recipe.yaml").is_file():
                write_atomically(path / "recipe.yaml", to_yaml(recipe))
            with (path / "code.txt").open("a") as file:
                file.write(describe_code())
        except OSError as error:
            raise InputError(f"run directory {path} cannot be written: {error}") from None

    def release(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def append(self, name: str, line: dict[str, Any]) -> None:
        """A line to one of the records, METRICS or OSCILLATIONS."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def cut_records(self, epoch: int) -> None:
        """Drop lines after an epoch: a resumed run writes them again."""
        for name in (METRICS, OSCILLATIONS):
            kept = [line for line in read_lines(self.path / name) if line["epoch"] <= epoch]
            if name == METRICS or (self.path / name).is_file():
                write_atomically(self.path / name, "".join(json.dumps(line) + "\n" for line in kept))

    def write_outcome(self, outcome: str, *, requeue: bool = False, **more: Any) -> None:
        write_outcome(self.path, outcome, requeue=requeue, **more)


def write_outcome(path: Path, outcome: str, *, requeue: bool = False, **more: Any) -> None:
    """How a run ended, or that it is running: finished, saved, diverged, failed; and whether to start it again."""
    content = {"outcome": outcome, "requeue": requeue, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **more}
    write_atomically(path / "outcome.json", json.dumps(content, indent=1) + "\n")


def lock(path: Path, doing: str) -> TextIO:
    """Hold a folder's `lock` until the returned file is closed. Raises InputError where another process holds it."""
    file = (path / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"another process is {doing} in {path}") from None
    return file


def read_recipe(path: Path) -> Recipe:
    if not (path / "recipe.yaml").is_file():
        raise InputError(f"{path} is not a run directory (no recipe.yaml)")
    return load(Recipe, path / "recipe.yaml")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return read_lines(path / METRICS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a record; none without a file, and a last line that was cut off in the middle is left out."""
    lines = file.read_text().splitlines() if file.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def read_outcome(path: Path) -> dict[str, Any]:
    """The content of outcome.json; {"outcome": "running"} before there is one."""
    file = path / "outcome.json"
    return json.loads(file.read_text()) if file.is_file() else {"outcome": "running", "requeue": False}


def write_atomically(path: Path, text: str) -> None:
    """Aside, synced, renamed: the file is the old one or the new one, after a loss of power too."""
    write_synced(aside_of(path), text.encode())
    aside_of(path).replace(path)


def aside_of(path: Path) -> Path:
    """Where a file is written before it has its name."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def describe_code() -> str:
    """Versions of the code, of Python and of the packages, the command, the variables of its environment that count."""
    import torch  # a run has it; who only reads run directories does without

    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (f"{time.strftime('%Y-%m-%d %H:%M:%S')}  nulsq {__version__}, {code_version()}\n"
            f"  python {platform.python_version()}, {', '.join(versions)}\n"
            f"  {platform.node()}, {devices}\n  {' '.join(sys.argv)}\n"
            f"  {' '.join(f'{name}={value!r}' for name, value in _environment().items())}\n")


def _environment():
    return {name: value for name, value in sorted(os.environ.items())
            if name.startswith(ENVIRONMENT) and not any(word in name.upper() for word in SECRETS)}


def code_version() -> str:
    """Which commit this code is of, with local changes or without, or what its snapshot was taken from."""
    here = Path(__file__).resolve().parent
    note = here.parent / SNAPSHOT
    if note.is_file():  # git would speak of a checkout that the copy happens to lie in
        return note.read_text().partition("\n")[0]
    try:
        git = [subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, timeout=20).stdout.strip()
               for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]
    except (OSError, subprocess.TimeoutExpired):
        return "git is not there"
    return f"commit {git[0]}{' with local changes' if git[1] else ''}" if git[0] else "not a git checkout"


def _same_recipe(path, recipe):
    changed = differences(read_recipe(path), recipe, FREE)
    if changed:
        raise InputError(f"{path} holds a run of another recipe ({'; '.join(changed[:4])}"
                         f"{'; ...' if len(changed) > 4 else ''}); choose another run.dir or run.train_id")
