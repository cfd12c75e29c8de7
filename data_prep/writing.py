"""Writes a data set folder atomically: into a folder beside it, renamed when everything is there."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.progress import progress
from nulsq.data.manifest import SPLITS, DataSet, Manifest, describe_file, write
from nulsq.data.photograph import read_rgb
from nulsq.errors import InputError
from nulsq.files import temporary_path


@dataclass(frozen=True)
class Beton:
    """How images are stored in `.beton` files; the defaults are FFCV's ImageNet recipe for ResNet-18."""

    write_mode: str = "proportion"  # raw, jpg, smart, proportion
    max_resolution: int = 400  # longer side in pixels; photographs only
    compress_probability: float = 0.1
    jpeg_quality: int = 90


def write_arrays(out: Path, *, name: str, classes: list[str], source: str, images: dict[str, np.ndarray],
                 labels: dict[str, np.ndarray]) -> Path:
    """A data set of small equal images, uint8 [N, H, W, 3] per split. Stored raw in `.beton`."""
    with _finished_at(out) as folder:
        for split in SPLITS:
            np.save(folder / f"{split}_images.npy", np.ascontiguousarray(images[split]))
            np.save(folder / f"{split}_labels.npy", labels[split].astype(np.int64))
            _write_beton(folder / f"{split}.beton", _Arrays(images[split], labels[split]), {"write_mode": "raw"}, 1)
        moments = [_moments(images["train"][..., channel]) for channel in range(3)]
        _finish(folder, Manifest(
            name=name, kind="arrays", classes=classes, mean=[m for m, _ in moments], std=[s for _, s in moments],
            counts={split: len(labels[split]) for split in SPLITS}, files={}, source=source,
            size=int(images["train"].shape[1]), writer={"write_mode": "raw"}))
    return out


def write_files(out: Path, *, name: str, classes: list[str], source: str, root: Path,
                paths: dict[str, list[str]], labels: dict[str, np.ndarray], mean: list[float], std: list[float],
                beton: Beton, workers: int, skipped: dict[str, str] | None = None) -> Path:
    """A data set of photographs: file lists relative to `root`, and `.beton` files with the photographs in them.

    `skipped`: path -> reason of files that were left out, for skipped.txt.
    """
    options = vars(beton)
    with _finished_at(out) as folder:
        if skipped:
            (folder / "skipped.txt").write_text("".join(f"{path}: {why}\n" for path, why in skipped.items()))
        for split in SPLITS:
            (folder / f"{split}_files.txt").write_text("".join(f"{path}\n" for path in paths[split]))
            np.save(folder / f"{split}_labels.npy", labels[split].astype(np.int64))
            photographs = _Photographs(root, paths[split], labels[split], folder / f"{split}.errors")
            _write_beton(folder / f"{split}.beton", photographs, options, workers)
            photographs.raise_errors()
        _finish(folder, Manifest(
            name=name, kind="files", classes=classes, mean=mean, std=std,
            counts={split: len(paths[split]) for split in SPLITS}, files={}, source=source,
            root=str(root.resolve()), writer=options))
    return out


def existing(out: Path, name: str) -> bool:
    """Whether a finished data set `name` is there; InputError where something else is."""
    if (out / "manifest.json").is_file():
        found = DataSet(out).name
        if found != name:
            raise InputError(f"{out} holds the data set {found}, not {name}; choose another --out")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a prepared data set; choose another --out")
    return False


@contextmanager
def _finished_at(out: Path):
    unfinished = temporary_path(out).name
    folder = out.with_name(f"{unfinished}-{os.getpid()}")
    for old in out.parent.glob(f"{unfinished}-*"):  # of a preparation that was killed
        if not Path("/proc", old.name.rpartition("-")[2]).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        if out.is_dir():
            out.rmdir()  # empty: `existing` made sure
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(folder: Path, manifest: Manifest) -> None:
    files = {file.name: describe_file(file) for file in sorted(folder.iterdir())}
    write(Manifest(**vars(manifest) | {"files": files}), folder)


class _Arrays:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return np.ascontiguousarray(self.images[index]), int(self.labels[index])


class _Photographs:
    """Decoded photographs for FFCV's writer, whose worker processes hang on an exception: errors go to a file."""

    def __init__(self, root, paths, labels, errors):
        self.root, self.paths, self.labels, self.errors = root, paths, labels, errors

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.root / self.paths[index]
        try:
            return np.asarray(read_rgb(path)), int(self.labels[index])
        except InputError as error:
            with self.errors.open("a") as file:
                file.write(f"{error}\n")
            return np.zeros((1, 1, 3), np.uint8), int(self.labels[index])

    def raise_errors(self):
        if self.errors.exists():
            lines = self.errors.read_text().splitlines()
            for line in lines:
                print(line, file=sys.stderr)
            raise InputError(f"{len(lines)} of {len(self)} images cannot be read any more, listed above; nothing was "
                             "written")


def _write_beton(path: Path, samples: Sequence, options: dict, workers: int) -> None:
    if importlib.util.find_spec("ffcv") is None:
        print(f"ffcv is not installed: {path.name} is left out, the torchvision loader needs none")
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
    """Mean and standard deviation of uint8 values over 255, from their histogram, to five digits."""
    share = np.bincount(channel.reshape(-1), minlength=256) / channel.size
    values = np.arange(256) / 255
    mean = (share * values).sum()
    return round(float(mean), 5), round(float(np.sqrt((share * (values - mean) ** 2).sum())), 5)
