"""A copy of the code for a job that starts later, so that edits made while it waits in the queue do not reach it.

The copy has what git would commit: tracked files and new ones that git does not ignore, as they are on disk. A plug-in
quantizer in the checkout is copied too; files of more than 8 MB are not. Without git, all files of the project's
packages are copied. Equal code is copied once: the folder's name, code-HASH, is a hash of its files. `SNAPSHOT` in the
folder says what it was copied from.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from nulsq.config import resolved
from nulsq.errors import InputError
from nulsq.files import temporary_path, write_atomically
from nulsq.run.provenance import SNAPSHOT, code_version

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("nulsq", "tune", "launch", "data_prep", "configs")
LARGEST = 8 * 2**20  # bytes


def take(parent: Path) -> Path:
    """Copy the code to parent/code-HASH, unless it is there. Returns that folder.

    The copy is renamed when it is complete. Raises InputError where it cannot be written.
    """
    files = [name for name in _listed() if (ROOT / name).is_file() and (ROOT / name).stat().st_size <= LARGEST]
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0{(ROOT / name).stat().st_size}\0".encode() + (ROOT / name).read_bytes())
    folder = parent / f"code-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    temporary = temporary_path(parent / f"{folder.name}-{os.getpid()}")  # another launch may copy the same code
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, temporary / name)
        version = code_version().removeprefix("snapshot of ")  # a job may launch another job
        (temporary / SNAPSHOT).write_text(f"snapshot of {version}, taken {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.is_dir():  # the other launch was faster
            return folder
        raise InputError(f"the code cannot be copied to {folder}: {error}") from None
    return folder


def place(snapshot: Path, file: str | Path) -> Path:
    """Where a recipe or search file will be for a job: in the snapshot, or next to it for a file from elsewhere.

    The file and its folder keep their names, because a recipe is named after them. Writes nothing.
    """
    file = Path(file).resolve()
    if file.is_relative_to(ROOT) and str(file.relative_to(ROOT)) in _listed():
        return snapshot / file.relative_to(ROOT)
    digest = hashlib.sha256(resolved(file).encode()).hexdigest()[:12]
    return snapshot.parent / f"files-{digest}" / file.parent.name / file.name


def keep(snapshot: Path, file: str | Path) -> Path:
    """Write a recipe or search file to its `place`, with its base files merged in, because a base from elsewhere would
    be missing there. Returns that place.
    """
    copy, text = place(snapshot, file), resolved(file)
    if not copy.is_file() or copy.read_text() != text:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(copy, text)
    return copy


@functools.cache
def _listed() -> list[str]:
    """The files of a snapshot, relative to ROOT."""
    try:
        listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                 capture_output=True, timeout=60)
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
        if listing.returncode == 0 and listing.stdout and Path(top.stdout.strip()).resolve() == ROOT:
            return sorted({name for name in os.fsdecode(listing.stdout).split("\0") if name})
    except (OSError, subprocess.TimeoutExpired):
        pass
    return sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*")
                  if path.is_file() and "__pycache__" not in path.parts)
