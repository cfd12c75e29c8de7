"""python -m data_prep check PATH: compare a data set with its manifest: sizes, checksums, counts, labels, pixels."""

import os
from pathlib import Path

import numpy as np

from data_prep.examine import undecodable
from nulsq.data import beton_format
from nulsq.data.manifest import SPLITS, DataSet, describe_file
from nulsq.errors import InputError


def check(path: Path, *, decode: bool = False, workers: int | None = None) -> str:
    """Check a prepared data set, or a single `.beton` file inside or outside of one; returns a line that sums it up.

    decode: decode every sample of the `.beton` files too, in `workers` processes (default: as many as cores).
    Raises InputError that names the first file, and sample, that differs from what was written.
    """
    if path.suffix == ".beton" and not path.is_dir():
        return _check_beton(path, decode, workers)
    data = DataSet(path)  # checks that all files are there, with their sizes
    for name in data.files:
        _check_checksum(data, name)
    for split in SPLITS:
        labels = data.labels(split)
        if len(labels) != data.counts[split]:
            raise InputError(f"{path}: {len(labels)} {split} labels, the manifest counts {data.counts[split]}")
        if labels.min() < 0 or labels.max() >= len(data.classes):
            raise InputError(f"{path}: {split} labels outside 0..{len(data.classes) - 1}")
        missing = np.setdiff1d(np.arange(len(data.classes)), labels)
        if len(missing):
            raise InputError(f"{path}: no {split} image of class {data.classes[missing[0]]}")
        beton = data.beton(split)
        if beton is not None:
            file = beton_format.read(beton, labels)
            if decode:
                _check_decodes(beton, workers)
                if data.storage == "arrays":
                    _check_pixels(data, split, file)
    counts = ", ".join(f"{data.counts[split]} {split}" for split in SPLITS)
    return f"{path}: {counts} images, {len(data.classes)} classes, {len(data.files)} files as written" + (
        ", every sample decoded" if decode else "")


def _check_beton(path: Path, decode: bool, workers: int | None) -> str:
    if (path.parent / "manifest.json").is_file():
        data = DataSet(path.parent)
        if path.name not in data.files:
            raise InputError(f"{path} is not a file of the data set {path.parent}")
        _check_checksum(data, path.name)
        file = beton_format.read(path, data.labels(path.stem))
        compared = "checksum and labels as written"
    else:
        if not path.is_file():
            raise InputError(f"no file {path}")
        file = beton_format.read(path)
        compared = "checksum unknown: no manifest.json next to it"
    if decode:
        _check_decodes(path, workers)
    return f"{path}: {len(file.samples)} samples, {len(np.unique(file.samples['label']))} labels, {compared}" + (
        ", every sample decoded" if decode else "")


def _check_checksum(data: DataSet, name: str) -> None:
    if describe_file(data.path / name) != data.files[name]:
        raise InputError(f"{data.path / name}: the checksum is not the one that it was written with")


def _check_decodes(path: Path, workers: int | None) -> None:
    damaged = undecodable(path, workers or os.cpu_count() or 1)
    if damaged:
        raise InputError(f"{path}: {len(damaged)} samples cannot be decoded: {', '.join(map(str, damaged[:20]))}"
                         f"{', ...' if len(damaged) > 20 else ''}")


def _check_pixels(data: DataSet, split: str, file: beton_format.BetonFile) -> None:
    images = data.images(split)
    for index in range(len(images)):
        if file.bytes_of(index) != images[index].tobytes():
            raise InputError(f"{file.path}: the pixels of sample {index} are not those of {split}_images.npy")
