"""Copies a prepared data set to a node's own disk: python -m launch.stage DATA SCRATCH

A job runs it once on every node, before the ranks start; NULSQ_SCRATCH=SCRATCH then makes `DataSet` read the copy,
while recipes go on naming DATA. What is copied is manifest.json and the files that it names: arrays, labels, lists and
.beton files. Photographs in class folders stay where they are: without .beton files they are read from there.

    SCRATCH/nulsq-data-UID/DIGEST/              the copy; DIGEST: first 16 hex digits of manifest.json's sha256
    SCRATCH/nulsq-data-UID/.DIGEST.unfinished/  a copy in the making or killed: the next one clears it away
    SCRATCH/nulsq-data-UID/.DIGEST.lock         held while one process of a node copies; others wait, then find it

Every file's sha256 is computed as it is copied. A copy that is there counts by its manifest and its files' sizes; one
that does not is made again. Data that are prepared anew have another manifest and get a folder of their own.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nulsq.data.manifest import SCRATCH, DataFile, copy_of, is_whole, read
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.files import write_synced

BLOCK = 1 << 23  # bytes that are read at a time


def stage(source: Path, scratch: Path) -> tuple[Path, bool]:
    """Copy the data set in `source` below `scratch`, unless it is there. Returns the copy's folder, and whether this
    process has made it.

    Raises InputError for a source that is damaged, a disk without room for it, or a folder that cannot be written;
    nothing that looks like a copy is left then.
    """
    manifest = read(source)
    try:
        text = (source / "manifest.json").read_bytes()
        folder = copy_of(scratch, text)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # in a /tmp that everybody has
        if folder.parent.stat().st_uid != os.getuid():
            raise InputError(f"{folder.parent} is somebody else's; choose another scratch")
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if is_whole(folder, text):
                return folder, False
            aside = folder.with_name(f".{folder.name}.unfinished")
            for old in (aside, folder):  # of a copy that was killed; one that somebody has changed
                shutil.rmtree(old, ignore_errors=True)
            _check_room(folder.parent, manifest.files)
            aside.mkdir()
            try:
                for name, wanted in manifest.files.items():
                    _copy(source, aside, name, wanted)
                write_synced(aside / "manifest.json", text)
                _sync(aside)
                aside.rename(folder)
                _sync(folder.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return folder, True
    except OSError as error:
        raise InputError(f"{source} cannot be copied to {scratch}: {error}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, after whoever holds it now. It stays: removed, it would be two locks for those who wait."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process copies to {path.parent}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_room(folder: Path, files: dict[str, DataFile]) -> None:
    needed, free = sum(file.bytes for file in files.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder} has {free / 1e9:.2f} GB free, the data need {needed / 1e9:.2f} GB: "
                         f"{(needed - free) / 1e9:.2f} GB are missing")


def _copy(source: Path, folder: Path, name: str, wanted: DataFile) -> None:
    if Path(name).name != name:
        raise InputError(f"{source / 'manifest.json'} names the file {name!r}: not one of its own folder")
    if not (source / name).is_file():
        raise InputError(f"{source / name} is missing; make the data set again with python -m data_prep")
    digest = hashlib.sha256()
    with (source / name).open("rb", buffering=0) as original, (folder / name).open("wb", buffering=0) as copy:
        while block := original.read(BLOCK):
            digest.update(block)
            if copy.write(block) != len(block):
                raise OSError(f"{folder / name} was written in part only")
        os.fsync(copy.fileno())
        size = copy.tell()
    if size != wanted.bytes:
        raise InputError(f"{source / name} has {size} bytes, it was written with {wanted.bytes}: truncated or "
                         "replaced; make the data set again with python -m data_prep")
    if digest.hexdigest() != wanted.sha256:
        raise InputError(f"{source / name}: the checksum is not the one that it was written with; make the data set "
                         "again with python -m data_prep")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parser() -> Parser:
    made = Parser(prog="python -m launch.stage", description=__doc__)
    made.add_argument("data", type=Path, help="prepared data set, as recipes name it")
    made.add_argument("scratch", type=Path, help=f"folder on this node's own disk; the ranks find it in {SCRATCH}")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    began = time.monotonic()
    folder, copied = stage(arguments.data, arguments.scratch)
    took = time.monotonic() - began
    size = sum(file.bytes for file in read(folder).files.values()) / 1e6
    if copied:
        print(f"copied {arguments.data} to {folder}: {size:.1f} MB in {took:.1f} s ({size / took:.0f} MB/s)")
    else:
        print(f"{arguments.data} is at {folder} already: {size:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
