"""Copies a prepared data set to a node's own disk: python -m launch.stage DATA SCRATCH

A job runs it once on every node before the ranks start. With NULSQ_SCRATCH=SCRATCH, `DataSet` then reads the copy, and
recipes still name DATA. It copies manifest.json and the files that it names: arrays, labels, lists and .beton files.
Photographs in class folders are not copied: a data set without .beton files reads them from there.

    SCRATCH/nulsq-data-UID/DIGEST/              the copy; DIGEST: first 16 hex digits of manifest.json's sha256
    SCRATCH/nulsq-data-UID/.DIGEST.unfinished/  a copy in progress, or of a killed process; the next one removes it
    SCRATCH/nulsq-data-UID/.DIGEST.lock         held while a process of the node copies; others wait, then use its copy

Every file's sha256 is computed while it is copied. An existing copy is used if it has the same manifest and its files
have their sizes; otherwise it is replaced. A data set that is prepared again has another manifest, so another folder.
"""

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from nulsq.data.manifest import SCRATCH, DataFile, copy_of, is_whole, read
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.files import lock, sync_folder, temporary_path, write_synced

BLOCK = 1 << 23  # bytes that are read at a time


def stage(source: Path, scratch: Path) -> tuple[Path, bool]:
    """Copy the data set in `source` below `scratch`, unless it is there.

    Returns the copy's folder, and whether this process made it. Raises InputError for a damaged source, a disk without
    enough space, or a folder that cannot be written; it then leaves nothing that looks like a copy.
    """
    manifest = read(source)
    try:
        text = (source / "manifest.json").read_bytes()
        folder = copy_of(scratch, text)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # scratch may be a /tmp that all users share
        if folder.parent.stat().st_uid != os.getuid():
            raise InputError(f"{folder.parent} belongs to another user; choose another scratch")
        with _waiting_lock(folder.with_name(f".{folder.name}.lock")):
            if is_whole(folder, text):
                return folder, False
            temporary = temporary_path(folder)
            for old in (temporary, folder):  # what a killed process left; a copy that was changed
                shutil.rmtree(old, ignore_errors=True)
            _check_space(folder.parent, manifest.files)
            temporary.mkdir()
            try:
                for name, expected in manifest.files.items():
                    _copy(source, temporary, name, expected)
                write_synced(temporary / "manifest.json", text)
                sync_folder(temporary)
                temporary.rename(folder)
                sync_folder(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return folder, True
    except OSError as error:
        raise InputError(f"{source} cannot be copied to {scratch}: {error}") from None


def _waiting_lock(path: Path) -> TextIO:
    """Lock a file, and say so if another process has to release it first. The file is never removed: a process that
    waits for the removed file and one that locks a new file would both go ahead.
    """
    file = lock(path)
    if file is None:
        print(f"another process copies to {path.parent}; waiting for it", flush=True)
        file = lock(path, wait=True)
    assert file is not None
    return file


def _check_space(folder: Path, files: dict[str, DataFile]) -> None:
    needed, free = sum(file.bytes for file in files.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder} has {free / 1e9:.2f} GB free, the data need {needed / 1e9:.2f} GB: "
                         f"{(needed - free) / 1e9:.2f} GB are missing")


def _copy(source: Path, folder: Path, name: str, expected: DataFile) -> None:
    if Path(name).name != name:
        raise InputError(f"{source / 'manifest.json'} names the file {name!r}, which is not in its own folder")
    if not (source / name).is_file():
        raise InputError(f"{source / name} is missing; make the data set again with python -m data_prep")
    digest = hashlib.sha256()
    with (source / name).open("rb", buffering=0) as original, (folder / name).open("wb", buffering=0) as copy:
        while block := original.read(BLOCK):
            digest.update(block)
            if copy.write(block) != len(block):
                raise OSError(f"{folder / name} was written only in part")
        os.fsync(copy.fileno())
        size = copy.tell()
    if size != expected.bytes:
        raise InputError(f"{source / name} has {size} bytes, it was written with {expected.bytes}: truncated or "
                         "replaced; make the data set again with python -m data_prep")
    if digest.hexdigest() != expected.sha256:
        raise InputError(f"{source / name}: its checksum differs from the one in the manifest; make the data set again "
                         "with python -m data_prep")


def parser() -> Parser:
    command = Parser(prog="python -m launch.stage", description=__doc__)
    command.add_argument("data", type=Path, help="prepared data set, as recipes name it")
    command.add_argument("scratch", type=Path, help=f"folder on this node's own disk; the ranks find it in {SCRATCH}")
    return command


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    start = time.monotonic()
    folder, copied = stage(arguments.data, arguments.scratch)
    seconds = time.monotonic() - start
    size = sum(file.bytes for file in read(folder).files.values()) / 1e6
    if copied:
        print(f"copied {arguments.data} to {folder}: {size:.1f} MB in {seconds:.1f} s ({size / seconds:.0f} MB/s)")
    else:
        print(f"{arguments.data} is at {folder} already: {size:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
