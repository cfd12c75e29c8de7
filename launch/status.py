"""The state of what was submitted, its logs, and how it is stopped: `python -m launch status|logs|stop DIR`."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from launch import jobs
from launch.jobs import Job
from nulsq.errors import InputError
from nulsq.run.directory import read_metrics
from nulsq.run.status import FILE, read_outcome

PLACES = {"slurm": "launch.slurm", "ray": "launch.ray_jobs"}


def place_of(job: Job) -> ModuleType:
    """The module of the job's place. It has the functions state, stop and follow."""
    return importlib.import_module(PLACES[job.place])


def status(directory: Path) -> int:
    """Print the jobs of a run or search, its outcome and its progress."""
    check(directory)
    for job in jobs.submitted(directory):
        print(f"{job.place} job {job.id}, submitted {job.submitted}: {place_of(job).state(job)}")
    if (directory / "search.yaml").is_file():
        return subprocess.run([sys.executable, "-m", "tune.status", str(directory)]).returncode
    if not (directory / FILE).is_file():
        print("it has not started")
        return 0
    outcome = read_outcome(directory)
    details = ", ".join(f"{name} {outcome[name]}" for name in ("epoch", "step", "error") if name in outcome)
    print(f"outcome: {outcome['outcome']}{f' ({details})' if details else ''}, {outcome.get('time', '')}")
    lines = read_metrics(directory)
    if lines:
        print("last epoch: " + "  ".join(f"{name} {lines[-1][name]:.4g}" for name in
                                         ("epoch", "train_loss", "val_top1", "seconds") if name in lines[-1]))
    return 0


def logs(directory: Path, *, follow: bool) -> int:
    """Print the logs of the last submission; `follow`: and what is added, until it ends.

    Ctrl-C ends the following, not the job.
    """
    check(directory)
    job = jobs.latest(directory)
    try:
        return place_of(job).follow(job) if follow else place_of(job).print_logs(job)
    except KeyboardInterrupt:
        print(f"\nno longer followed; job {job.id} continues")
        return 130


def stop(directory: Path) -> int:
    """Request every waiting or running job of a run or search to save and to end."""
    check(directory)
    last = jobs.latest(directory)
    for job in jobs.submitted(directory):
        if job == last or place_of(job).state(job) != jobs.ENDED:
            print(f"{job.place} job {job.id}: {place_of(job).stop(job)}")
    return 0


def check(directory: Path) -> None:
    """Raises InputError for a path that is not a folder."""
    if not directory.is_dir():
        near = sorted(str(path) for path in directory.parent.glob("*") if path.is_dir())
        raise InputError(f"there is no folder {directory}" + (f"; there are {', '.join(near[:6])}" if near else ""))
