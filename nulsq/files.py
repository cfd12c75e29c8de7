"""Files that survive a crash: atomic replacement, folder locks, and records of JSON lines.

A file is written under a temporary name in its own folder, synced, then renamed. Whatever interrupts that, a reader
finds the old content or the new one.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

UNFINISHED = ".unfinished"  # ends the name of every temporary file and folder


def temporary_path(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f".{path.name}{UNFINISHED}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` at the end, or remove it if the block raises.

    The caller syncs the content where it must survive a loss of power.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replace a file by `content`, synced to disk."""
    with replacing(path) as temporary:
        write_synced(temporary, content.encode() if isinstance(content, str) else content)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries, so that a rename in it survives a loss of power. Not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- locks


def lock(path: Path, *, shared: bool = False, wait: bool = False) -> TextIO | None:
    """Lock a file until the returned object is closed or the process ends; creates the file where it is missing.

    Returns None where another process holds the lock and `wait` is False. Raises OSError where the file cannot be
    created or locked.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def is_locked(path: Path) -> bool:
    """Whether another process holds the exclusive lock of a file. False where the file does not exist.

    Permission to read the file is enough.
    """
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# ---- records: one JSON object per line


def append_line(path: Path, record: dict[str, Any], *, sync: bool = False) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, up to a line that was cut off in the middle; [] where there is no file."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace a file of records."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def repair_tail(path: Path) -> None:
    """Drop a last line that a full disk or a loss of power cut off; a record appended to it would be lost too."""
    if path.is_file() and not path.read_text().endswith("\n"):
        write_lines(path, read_lines(path))
