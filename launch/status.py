"""How what was submitted is, what it printed, and how it is stopped: `python -m launch status|logs|stop DIR`."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from launch import jobs
from launch.jobs import Job
from nulsq.errors import InputError
from nulsq.run.directory import read_metrics
from nulsq.run.status import read_outcome

PLACES = {"slurm": "launch.slurm", "ray": "launch.ray_jobs"}


def place_of(job: Job) -> ModuleType:
    """The module that knows how jobs of this kind are asked and stopped: state, stop, follow."""
    return importlib.import_module(PLACES[job.place])


def status(directory: Path) -> int:
    """Print the jobs of a run or search, how it ended or is, and how far it has come."""
    check(directory)
    for job in jobs.submitted(directory):
        print(f"{job.place} job {job.id}, submitted {job.submitted}: {place_of(job).state(job)}")
    if (directory / "search.yaml").is_file():
        return subprocess.run([sys.executable, "-m", "tune.status", str(directory)]).returncode
    outcome = read_outcome(directory)
    if not (directory / "outcome.json").is_file():
        print("it has not begun")
        return 0
    ended = ", ".join(f"{name} {outcome[name]}" for name in ("epoch", "step", "error") if name in outcome)
    print(f"outcome: {outcome['outcome']}{f' ({ended})' if ended else ''}, {outcome.get('time', '')}")
    lines = read_metrics(directory)
    if lines:
        print("last epoch: " + "  ".join(f"{name} {lines[-1][name]:.4g}" for name in
                                         ("epoch", "train_loss", "val_top1", "seconds") if name in lines[-1]))
    return 0


def logs(directory: Path, *, going_on: bool) -> int:
    """Print what the last submission's processes printed. Ctrl-C ends the following, not the job."""
    check(directory)
    job = jobs.latest(directory)
    try:
        return place_of(job).follow(job, going_on)
    except KeyboardInterrupt:
        print(f"\nno longer followed; job {job.id} continues")
        return 130


def stop(directory: Path) -> int:
    """Ask every job of a run or search that waits or runs to save itself and to end."""
    check(directory)
    jobs.latest(directory)
    for job in jobs.submitted(directory):
        if place_of(job).state(job) != jobs.ENDED or job == jobs.latest(directory):
            print(f"{job.place} job {job.id}: {place_of(job).stop(job)}")
    return 0


def check(directory: Path) -> None:
    """Raises InputError for what is no folder of a run or search."""
    if not directory.is_dir():
        near = sorted(str(path) for path in directory.parent.glob("*") if path.is_dir())
        raise InputError(f"there is no folder {directory}" + (f"; there are {', '.join(near[:6])}" if near else ""))
