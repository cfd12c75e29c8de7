"""The code as it is now, copied for a job that starts later. Edits made while it waits in the queue do not reach it.

Copied is what git would commit: tracked files and new ones that it does not ignore, as they are on disk. A plug-in
quantizer beside the code comes along; files of more than 8 MB do not. Without git, the rooms' own files. Equal code is
copied once: the folder is called by what is in it, code-HASH. `SNAPSHOT` in it says what it was taken from.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from nulsq.errors import InputError
from nulsq.run.provenance import SNAPSHOT, code_version

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("nulsq", "tune", "launch", "data_prep", "configs")
LARGEST = 8 * 2**20


def take(into: Path) -> Path:
    """Copy the code into a folder below `into`, unless it is there; the folder. Raises InputError where it cannot be.

    Written aside and renamed: a folder of that name is whole.
    """
    files = [name for name in _listed() if (ROOT / name).is_file() and (ROOT / name).stat().st_size <= LARGEST]
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0{(ROOT / name).stat().st_size}\0".encode() + (ROOT / name).read_bytes())
    folder = into / f"code-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    aside = into / f".{folder.name}-{os.getpid()}"
    try:
        for name in files:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, aside / name)
        version = code_version().removeprefix("snapshot of ")  # a job may launch one
        (aside / SNAPSHOT).write_text(f"snapshot of {version}, taken {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if folder.is_dir():  # somebody else took the same one
            return folder
        raise InputError(f"the code cannot be copied to {folder}: {error}") from None
    return folder


def place(snapshot: Path, file: str | Path) -> Path:
    """Where a recipe or search file will be for a job: in the snapshot, or beside it for a file from elsewhere.

    It keeps its name and its folder's, which a recipe is called by. Writes nothing.
    """
    file = Path(file).resolve()
    if file.is_relative_to(ROOT) and str(file.relative_to(ROOT)) in _listed():
        return snapshot / file.relative_to(ROOT)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return snapshot.parent / f"files-{digest}" / file.parent.name / file.name


def keep(snapshot: Path, file: str | Path) -> Path:
    """The same, and the file is there now."""
    there = place(snapshot, file)
    if not there.is_file():
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, there)
    return there


@functools.cache
def _listed():
    try:
        done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                              capture_output=True, timeout=60)
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout and Path(top.stdout.strip()).resolve() == ROOT:
            return sorted({name for name in os.fsdecode(done.stdout).split("\0") if name})
    except (OSError, subprocess.TimeoutExpired):
        pass
    return sorted(str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*")
                  if path.is_file() and "__pycache__" not in path.parts)
