"""Records of what was submitted, in the run's or search's own folder: DIR/launch/TIME/, one folder per submission.

    job.json     place, id, command and site      job.sh       what Slurm or Ray runs
    *.log        what its processes printed       environment-*.txt   of the job's first node
    ../code-*/   snapshot of the code             ../stop      tells the running job to save and not to come back
    preflight-*.json   what preflight measured before training
"""

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.site import Site
from nulsq.errors import InputError
from nulsq.files import write_atomically
from nulsq.run.directory import LAUNCH, lock_folder

STOP = "stop"
ENDED = "ended"  # the state of a job that is neither waiting nor running
UNKNOWN = "unknown"  # starts the state of a job whose cluster does not answer


@dataclass(frozen=True)
class Job:
    """One submission."""

    place: str  # slurm or ray
    id: str
    directory: str  # of the run or search
    folder: str  # of this submission
    command: list[str] = field(default_factory=list)  # submits it again, from the same working directory
    site: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    started_in: str = ""
    submitted: str = ""

    @property
    def path(self) -> Path:
        return Path(self.folder)


def open_folder(directory: Path) -> Path:
    """Make the folder of a new submission, and remove what `launch stop` left.

    Raises InputError where it cannot be written.
    """
    try:
        top = directory / LAUNCH
        top.mkdir(parents=True, exist_ok=True)
        (top / STOP).unlink(missing_ok=True)
        for attempt in range(1000):
            folder = top / (time.strftime("%Y%m%d-%H%M%S") + (f"-{attempt}" if attempt else ""))
            try:
                folder.mkdir()
                return folder.resolve()
            except FileExistsError:
                continue
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error}") from None
    raise InputError(f"{top} has a thousand submissions of this second")


def record(place: str, id: str, directory: Path, folder: Path, command: list[str], site: Site, code: Path) -> Job:
    """Write the job of a submission from this working directory, now, into its folder."""
    job = Job(place, id, str(directory), str(folder), command, dataclasses.asdict(site), str(code), os.getcwd(),
              time.strftime("%Y-%m-%dT%H:%M:%S"))
    write(job)
    return job


def write(job: Job) -> None:
    write_atomically(job.path / "job.json", json.dumps(dataclasses.asdict(job), indent=1) + "\n")


def submitted(directory: Path) -> list[Job]:
    """The submissions of a run or search, oldest first."""
    jobs = [Job(**json.loads(file.read_text())) for file in directory.glob(f"{LAUNCH}/*/job.json")]
    return sorted(jobs, key=lambda job: (job.submitted, job.folder))


def latest(directory: Path) -> Job:
    """The last submission. Raises InputError where there is none."""
    jobs = submitted(directory)
    if not jobs:
        near = sorted({str(file.parents[2]) for file in directory.parent.glob(f"*/{LAUNCH}/*/job.json")})
        raise InputError(f"{directory} was not submitted anywhere (no {LAUNCH}/*/job.json)"
                         + (f"; there are {', '.join(near[:5])}" if near else ""))
    return jobs[-1]


def request_stop(job: Job) -> None:
    """Leave a file for the job's script: once the run has saved, it must not be started again."""
    (Path(job.directory) / LAUNCH / STOP).touch()


def check_free(directory: Path, place: str, state: Callable[[Job], str]) -> None:
    """Raises InputError where a process works in the directory, or a job of it waits or runs.

    `state(job)` returns the state of a job of this place. For jobs of another place, and those whose state is unknown
    because their cluster does not answer, only the directory's lock shows whether they run.
    """
    for job in submitted(directory):
        current = state(job) if job.place == place else ENDED
        if current != ENDED and not current.startswith(UNKNOWN):
            raise InputError(f"job {job.id} ({current}) holds {directory}; python -m launch stop {directory} ends it")
    if (directory / "lock").is_file():
        lock_folder(directory, "working").close()


def next_steps(job: Job) -> str:
    """The job's id and the commands that follow, inspect, stop and resume it."""
    directory = shlex.quote(job.directory)
    return (f"job {job.id}\n  follow   python -m launch logs {directory} --follow\n"
            f"  status   python -m launch status {directory}\n"
            f"  stop     python -m launch stop {directory}\n"
            "  resume   the same command; it continues from the newest checkpoint")
