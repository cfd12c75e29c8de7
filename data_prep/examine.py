"""Decode every photograph before anything is written, and name those that cannot be used."""

import io
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.progress import progress, tracked
from nulsq.data import beton_format
from nulsq.data.photograph import problem
from nulsq.errors import InputError


def examine(root: Path, paths: Sequence[str], workers: int) -> dict[str, str]:
    """Decode every photograph; return path relative to `root` -> reason for those that cannot be used."""
    with ProcessPoolExecutor(max(1, workers)) as pool:
        reasons = pool.map(problem, (root / path for path in paths), chunksize=32)
        return {path: reason
                for path, reason in zip(paths, tracked(reasons, "reading", len(paths)), strict=True) if reason}


def report_problems(problems: dict[str, str], total: int, on_error: str, max_share: float) -> None:
    """Print every file with its reason on stderr.

    Raises InputError if there are any and `on_error` is "fail", or if they are more than `max_share` of `total` files.
    """
    for path, reason in problems.items():
        print(f"{path}: {reason}", file=sys.stderr)
    if not problems:
        return
    if on_error == "fail":
        raise InputError(f"{len(problems)} of {total} files cannot be used, listed above; nothing was written "
                         "(--on-error skip leaves them out)")
    if len(problems) > max_share * total:
        raise InputError(f"{len(problems)} of {total} files cannot be used, listed above: more than --max-skipped = "
                         f"{max_share:g} allows; nothing was written")


def undecodable(path: Path, workers: int) -> list[int]:
    """Indices of the JPEG samples of a `.beton` file that Pillow cannot decode.

    Pillow is not the decoder of the FFCV loader, so a fault in one of them is noticed.
    """
    file = beton_format.read(path)
    jpegs = np.flatnonzero(file.samples["mode"] == beton_format.JPEG)
    if not len(jpegs):
        return []
    workers, damaged = max(1, workers), []
    pieces = np.array_split(jpegs, min(len(jpegs), max(20, 4 * workers)))
    with ProcessPoolExecutor(workers) as pool, closing(progress(f"decoding {path.name}", len(jpegs))) as shown:
        for piece, indices in zip(pieces, pool.map(_undecodable_among, (path for _ in pieces), pieces), strict=True):
            damaged += indices
            shown.update(len(piece))
    return damaged


def _undecodable_among(path: Path, indices: np.ndarray) -> list[int]:
    file, damaged = beton_format.read(path), []
    for index in indices.tolist():
        record = file.samples[index]
        try:
            with Image.open(io.BytesIO(file.bytes_of(index))) as image:
                image.load()
                if image.size != (record["width"], record["height"]):
                    damaged.append(index)
        except Exception:  # Pillow raises exceptions of many types for damaged bytes
            damaged.append(index)
    return damaged
