"""Write the folder of a data set, as a whole or not at all: under a temporary name, renamed when it is complete."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.progress import progress
from nulsq.data.manifest import SPLITS, DataSet, Manifest, describe_file, write
from nulsq.data.photograph import read_rgb
from nulsq.errors import InputError
from nulsq.files import temporary_path


@dataclass(frozen=True)
class Beton:
    """How `.beton` files store photographs: FFCV's options of these names, by default as in its ImageNet recipes."""

    write_mode: str = "proportion"  # raw, jpg, smart, proportion
    max_resolution: int = 400  # longer side in pixels
    compress_probability: float = 0.1  # share stored as JPEG with "proportion"
    jpeg_quality: int = 90


def write_arrays(out: Path, *, name: str, classes: list[str], source: str, images: dict[str, np.ndarray],
                 labels: dict[str, np.ndarray]) -> Path:
    """Write a data set of small equal images; returns `out`. Its `.beton` files have raw pixels.

    images: uint8 [N, H, W, 3] per split. labels: int [N] per split.
    """
    with _complete_folder(out) as folder:
        for split in SPLITS:
            np.save(folder / f"{split}_images.npy", np.ascontiguousarray(images[split]))
            np.save(folder / f"{split}_labels.npy", labels[split].astype(np.int64))
            _write_beton(folder / f"{split}.beton", _Arrays(images[split], labels[split]), {"write_mode": "raw"}, 1)
        moments = [_moments(images["train"][..., channel]) for channel in range(3)]
        _finish(folder, Manifest(
            name=name, storage="arrays", classes=classes, mean=[m for m, _ in moments], std=[s for _, s in moments],
            counts={split: len(labels[split]) for split in SPLITS}, files={}, source=source,
            size=int(images["train"].shape[1]), writer={"write_mode": "raw"}))
    return out


def write_files(out: Path, *, name: str, classes: list[str], source: str, root: Path,
                paths: dict[str, list[str]], labels: dict[str, np.ndarray], mean: list[float], std: list[float],
                beton: Beton, workers: int, skipped: dict[str, str] | None = None) -> Path:
    """Write a data set of photographs, as file lists and as `.beton` files; returns `out`.

    paths: of each split, relative to `root`. labels: int [N] per split. mean, std: of each channel, for values in 0..1.
    skipped: path -> reason of the files that were left out, for skipped.txt. Raises InputError if a photograph cannot
    be read any more.
    """
    options = vars(beton)
    with _complete_folder(out) as folder:
        if skipped:
            (folder / "skipped.txt").write_text("".join(f"{path}: {reason}\n" for path, reason in skipped.items()))
        for split in SPLITS:
            (folder / f"{split}_files.txt").write_text("".join(f"{path}\n" for path in paths[split]))
            np.save(folder / f"{split}_labels.npy", labels[split].astype(np.int64))
            photographs = _Photographs(root, paths[split], labels[split], folder / f"{split}.errors")
            _write_beton(folder / f"{split}.beton", photographs, options, workers)
            photographs.raise_errors()
        _finish(folder, Manifest(
            name=name, storage="files", classes=classes, mean=mean, std=std,
            counts={split: len(paths[split]) for split in SPLITS}, files={}, source=source,
            root=str(root.resolve()), writer=options))
    return out


def existing(out: Path, name: str) -> bool:
    """Whether `out` holds the finished data set `name`. Raises InputError if it holds something else."""
    if (out / "manifest.json").is_file():
        other = DataSet(out).name
        if other != name:
            raise InputError(f"{out} holds the data set {other}, not {name}; choose another --out")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a prepared data set; choose another --out")
    return False


@contextmanager
def _complete_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to; rename it to `out` at the end, or remove it if the block raises."""
    unfinished = temporary_path(out).name
    folder = out.with_name(f"{unfinished}-{os.getpid()}")
    for old in out.parent.glob(f"{unfinished}-*"):  # left by preparations that were killed
        if not Path("/proc", old.name.rpartition("-")[2]).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        if out.is_dir():
            out.rmdir()  # `existing` has checked that it is empty
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with the sizes and checksums of all files."""
    files = {file.name: describe_file(file) for file in sorted(folder.iterdir())}
    write(Manifest(**vars(manifest) | {"files": files}), folder)


class _Arrays:
    """Images and labels for FFCV's writer."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.ascontiguousarray(self.images[index]), int(self.labels[index])


class _Photographs:
    """Decoded photographs and labels for FFCV's writer.

    An exception in one of its worker processes would make the writer wait forever. A photograph that cannot be read is
    therefore noted in the file `errors` and replaced by a black pixel; `raise_errors` ends the preparation afterwards.
    """

    def __init__(self, root: Path, paths: list[str], labels: np.ndarray, errors: Path):
        self.root, self.paths, self.labels, self.errors = root, paths, labels, errors

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.root / self.paths[index]
        try:
            return np.asarray(read_rgb(path)), int(self.labels[index])
        except InputError as error:
            with self.errors.open("a") as file:
                file.write(f"{error}\n")
            return np.zeros((1, 1, 3), np.uint8), int(self.labels[index])

    def raise_errors(self) -> None:
        if self.errors.exists():
            lines = self.errors.read_text().splitlines()
            for line in lines:
                print(line, file=sys.stderr)
            raise InputError(f"{len(lines)} of {len(self)} images cannot be read any more, listed above; nothing was "
                             "written")


def _write_beton(path: Path, samples: _Arrays | _Photographs, options: dict[str, Any], workers: int) -> None:
    if importlib.util.find_spec("ffcv") is None:
        print(f"ffcv is not installed: {path.name} is not written; the torchvision loader does not need it")
        return
    from ffcv import writer
    from ffcv.fields import IntField, RGBImageField

    fields = {"image": RGBImageField(**options), "label": IntField()}
    # FFCV's writer makes its tqdm bar under this name, a private one of its module, and has no option for it. Public
    # ways do less: TQDM_DISABLE only works if it is set before anything imports tqdm, and stderr redirected during the
    # call would lose what a failing worker process prints.
    bar, writer.tqdm = writer.tqdm, lambda total: progress(f"writing {path.name}", total)
    try:
        writer.DatasetWriter(str(path), fields, num_workers=workers).from_indexed_dataset(samples, chunksize=50)
    finally:
        writer.tqdm = bar


def _moments(channel: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of uint8 values divided by 255, from their histogram, to five digits."""
    share = np.bincount(channel.reshape(-1), minlength=256) / channel.size
    values = np.arange(256) / 255
    mean = (share * values).sum()
    return round(float(mean), 5), round(float(np.sqrt((share * (values - mean) ** 2).sum())), 5)
