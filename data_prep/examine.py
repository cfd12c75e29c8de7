"""A look at every photograph before anything is written: which cannot be used, and why."""

import io
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nulsq.data import beton_format
from nulsq.data.photograph import problem
from nulsq.errors import InputError


def examine(root: Path, paths: Sequence[str], workers: int) -> dict[str, str]:
    """Path relative to `root` -> reason, for the photographs that cannot be used. Decodes every one."""
    with ProcessPoolExecutor(max(1, workers)) as pool:
        found = pool.map(problem, (root / path for path in paths), chunksize=32)
        return {path: reason for path, reason in zip(paths, tqdm(found, "reading", len(paths)), strict=True) if reason}


def told(problems: dict[str, str], of: int, on_error: str, most: float) -> None:
    """Print each; raises InputError where they may not be left out: `on_error` "fail", or more than a share `most`."""
    for path, reason in problems.items():
        print(f"{path}: {reason}", file=sys.stderr)
    if not problems:
        return
    if on_error == "fail":
        raise InputError(f"{len(problems)} of {of} files cannot be used, listed above; nothing was written "
                         "(--on-error skip leaves them out)")
    if len(problems) > most * of:
        raise InputError(f"{len(problems)} of {of} files cannot be used, listed above: more than --max-skipped = "
                         f"{most:g} allows; nothing was written")


def undecodable(path: Path, workers: int) -> list[int]:
    """Samples of a `.beton` file whose pixels cannot be decoded, by another decoder than the loader's."""
    file = beton_format.read(path)
    pieces = np.array_split(np.flatnonzero(file.samples["mode"] == beton_format.JPEG), 4 * max(1, workers))
    with ProcessPoolExecutor(max(1, workers)) as pool:
        found = pool.map(_undecodable, (file.path for _ in pieces), pieces)
        return [index for each in tqdm(found, f"decoding {path.name}", len(pieces)) for index in each]


def _undecodable(path, indices):
    file, found = beton_format.read(path), []
    for index in indices.tolist():
        record = file.samples[index]
        try:
            with Image.open(io.BytesIO(file.bytes_of(index))) as image:
                image.load()
                if image.size != (record["width"], record["height"]):
                    found.append(index)
        except Exception:  # whatever damaged bytes make Pillow raise
            found.append(index)
    return found
