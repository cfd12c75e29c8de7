"""Checkpoints: RUN/checkpoints/last.pt after every epoch, best.pt where a holdout says which is best.

Written aside, synced and renamed, so a file under its final name is whole. Read with `weights_only`: nothing in a
checkpoint is ever executed.
"""

import contextlib
import os
import shutil
from pathlib import Path

import torch

from nulsq.errors import InputError

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


def save(run: Path, content: dict, *, best: bool = False) -> Path:
    """Write last.pt, and make it best.pt too. Returns the folder that holds them."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    aside = folder / f".{LAST}.unfinished"
    with aside.open("wb") as file:
        torch.save(content | {"format": FORMAT}, file)
        file.flush()
        os.fsync(file.fileno())
    if best:
        # First: a last.pt that calls itself the best must find its best.pt. A link costs nothing, and neither file is
        # ever written into.
        second = folder / f".{BEST}.unfinished"
        second.unlink(missing_ok=True)
        try:
            os.link(aside, second)
        except OSError:
            shutil.copyfile(aside, second)
        second.replace(folder / BEST)
    aside.replace(folder / LAST)
    _sync_folder(folder)
    return folder


def load(path: Path) -> dict:
    """The content of a checkpoint file. Raises InputError where it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the reader raise whatever it comes upon
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version (format {FORMAT})")
    return content


def newest(run: Path) -> Path | None:
    path = run / "checkpoints" / LAST
    return path if path.is_file() else None


def best_or_last(run: Path) -> dict:
    """The checkpoint that a finished run stands for: its best on the holdout, else its last."""
    best = run / "checkpoints" / BEST
    return load(best if best.is_file() else run / "checkpoints" / LAST)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets one sync a directory
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
