"""A prepared data set: what its folder holds. `data_prep` writes it, the loaders read it.

manifest.json fixes the order of the samples and names every file with its size and checksum:

    train_labels.npy, test_labels.npy     int64 [N], by sample index
    train_images.npy, test_images.npy     uint8 [N, H, W, 3], of small equal images (storage "arrays")
    train_files.txt, test_files.txt       a path per sample, relative to `root`, of photographs (storage "files")
    train.beton, test.beton               the same samples in the same order for FFCV, if it was installed

`test` is the official test or validation set. The holdout that a search selects by is a part of `train`.

A recipe names the data set's folder. `python -m launch.stage` copies data sets to a node's own disk, below the folder
that the environment variable NULSQ_SCRATCH names. A complete copy with the same manifest.json is then read instead.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nulsq.data import beton_format
from nulsq.errors import InputError

FORMAT = 1
SPLITS = ("train", "test")
SCRATCH = "NULSQ_SCRATCH"  # environment variable: the folder on this node's own disk that has copies of data sets
AGAIN = "make the data set again with python -m data_prep"


@dataclass(frozen=True)
class DataFile:
    """A file as it was written."""

    bytes: int
    sha256: str
    records: str | None = None  # of a .beton file: checksum of all but its pixels, verified whenever it is opened


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, where `storage` has the key "kind"."""

    name: str
    storage: str  # "arrays": small equal images; "files": photographs
    classes: list[str]
    mean: list[float]  # per channel, of values in 0..1
    std: list[float]
    counts: dict[str, int]  # images per split
    files: dict[str, DataFile]
    source: str
    size: int | None = None  # side in pixels, for "arrays"
    root: str | None = None  # folder that file lists are relative to, for "files"
    writer: dict[str, Any] = field(default_factory=dict)  # options that the .beton files were written with
    format: int = FORMAT


class DataSet:
    """A prepared data set on disk. Raises InputError if a file is missing or has not the size that was written.

    Attributes:
        path: the folder that is read; a copy on this node's own disk if there is one (see `staged`).
        storage: "arrays" (small equal images) or "files" (photographs).
    """

    def __init__(self, path: str | Path):
        self.path = staged(Path(path))
        self.manifest = manifest = read(self.path)
        self.name, self.storage, self.classes = manifest.name, manifest.storage, manifest.classes
        self.counts, self.files, self.mean, self.std = manifest.counts, manifest.files, manifest.mean, manifest.std
        for name, written in manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise InputError(f"{file} is missing; {AGAIN}")
            if file.stat().st_size != written.bytes:
                raise InputError(f"{file} has {file.stat().st_size} bytes, it was written with {written.bytes}: "
                                 f"truncated or replaced; {AGAIN}")

    def labels(self, split: str) -> np.ndarray:
        """int64 [N]"""
        return np.load(self.path / f"{split}_labels.npy")

    def images(self, split: str) -> np.ndarray:
        """uint8 [N, H, W, 3], mapped from disk, for storage "arrays". Changes are never written back."""
        # "c", copy on write: torch warns about arrays that are read-only
        return np.load(self.path / f"{split}_images.npy", mmap_mode="c")

    def paths(self, split: str) -> list[Path]:
        """Absolute path of each sample, for storage "files"."""
        lines = (self.path / f"{split}_files.txt").read_text().splitlines()
        return [Path(self.manifest.root or "") / line for line in lines]

    def beton(self, split: str) -> Path | None:
        """The split's `.beton` file; None if the data set was prepared without FFCV."""
        name = f"{split}.beton"
        return self.path / name if name in self.manifest.files else None


def staged(path: Path) -> Path:
    """The copy of a data set on this node's own disk; `path` itself if there is no complete copy.

    Copies are below the folder that NULSQ_SCRATCH names and have to belong to this user.
    """
    scratch, file = os.environ.get(SCRATCH), path / "manifest.json"
    if not scratch or not file.is_file():
        return path
    manifest = file.read_bytes()
    copy = copy_of(Path(scratch), manifest)
    return copy if is_whole(copy, manifest) and copy.parent.stat().st_uid == os.getuid() else path


def copy_of(scratch: Path, manifest: bytes) -> Path:
    """Folder of the copy of a data set below `scratch`, named by the checksum of its manifest.json."""
    return scratch / f"nulsq-data-{os.getuid()}" / hashlib.sha256(manifest).hexdigest()[:16]


def is_whole(folder: Path, manifest: bytes) -> bool:
    """Whether a folder has this manifest.json and all of its files, each with its size."""
    try:
        return (folder / "manifest.json").read_bytes() == manifest and all(
            (folder / name).stat().st_size == written.bytes for name, written in read(folder).files.items())
    except OSError:
        return False


class FileWatch:
    """Notices that a file was replaced or changed since this object was made.

    Loaders map files into memory, where a change would go unnoticed and a shorter file would end the process.
    """

    def __init__(self, path: Path):
        self.path = path
        self.identity = self._identity()

    def raise_if_changed(self) -> None:
        """Raises InputError that names the file."""
        if self._identity() != self.identity:
            raise InputError(f"{self.path} was replaced or changed while it was in use")

    def _identity(self) -> tuple[int, ...] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def write(manifest: Manifest, folder: Path) -> None:
    content = {"kind" if key == "storage" else key: value for key, value in dataclasses.asdict(manifest).items()}
    (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


def describe_file(path: Path) -> DataFile:
    """Size and checksums of a file as it is now."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    records = beton_format.read(path).digest if path.suffix == ".beton" else None
    return DataFile(path.stat().st_size, digest.hexdigest(), records)


def read(folder: Path) -> Manifest:
    """The manifest of the data set in a folder. Raises InputError if there is none or it cannot be used."""
    file = folder / "manifest.json"
    if not file.is_file():
        raise InputError(f"{folder} is not a prepared data set (no manifest.json); "
                         "make one with python -m data_prep digits|cifar10|cifar100|folder|imagenet --out DIR")
    try:
        content = json.loads(file.read_text())
        if content.get("format") != FORMAT:
            raise InputError(f"{file} has format {content.get('format')}, this version reads {FORMAT}")
        content["files"] = {name: DataFile(**entry) for name, entry in content["files"].items()}
        return Manifest(storage=content.pop("kind"), **content)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged: {error}") from None
