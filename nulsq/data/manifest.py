"""What a prepared data set holds. Written by `data_prep`, read by the loaders.

A data set is a folder; `manifest.json` fixes the sample indices and names every file with its size and checksum:

    train_labels.npy, test_labels.npy     int64 [N], by sample index
    train_images.npy, test_images.npy     uint8 [N, H, W, 3], for small equal images (kind "arrays")
    train_files.txt, test_files.txt       a path per sample, relative to `root`, for photographs (kind "files")
    train.beton, test.beton               the same samples in the same order for FFCV, where it was installed

`test` is the official test or validation set. The holdout that selection sees is an index set over `train`.

Recipes name this folder, and its manifest.json is what the data set is: its checksum names the copies that
`python -m launch.stage` makes on a node's own disk. Where the environment variable NULSQ_SCRATCH says where they lie,
a finished copy of exactly this manifest is read instead; without one the folder itself is, and nothing is said.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nulsq.data import beton_format
from nulsq.errors import InputError

FORMAT = 1
SPLITS = ("train", "test")
SCRATCH = "NULSQ_SCRATCH"  # environment variable: the folder on this node's own disk that has copies of data sets


@dataclass(frozen=True)
class DataFile:
    bytes: int
    sha256: str
    records: str | None = None  # of a .beton file: the checksum of all but its pixels, looked at whenever it is opened


@dataclass(frozen=True)
class Manifest:
    name: str
    kind: str  # "arrays" or "files"
    classes: list[str]
    mean: list[float]  # per channel, of images in 0..1
    std: list[float]
    counts: dict[str, int]  # images per split
    files: dict[str, DataFile]
    source: str
    size: int | None = None  # pixels of each side, kind "arrays"
    root: str | None = None  # folder that file lists are relative to, kind "files"
    writer: dict = field(default_factory=dict)  # options that the .beton files were written with
    format: int = FORMAT


class DataSet:
    """A prepared data set on disk. Opening checks that every file is there with the size that was written.

    Attributes:
        path: the folder that is read: a copy on this node's own disk, where `staged` finds one.
    """

    def __init__(self, path: str | Path):
        self.path = staged(Path(path))
        self.manifest = manifest = read(self.path)
        self.name, self.kind, self.classes = manifest.name, manifest.kind, manifest.classes
        self.counts, self.files, self.mean, self.std = manifest.counts, manifest.files, manifest.mean, manifest.std
        for name, wanted in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise InputError(f"{file} is missing; make the data set again with python -m data_prep")
            if file.stat().st_size != wanted.bytes:
                raise InputError(f"{file} has {file.stat().st_size} bytes, it was written with {wanted.bytes}: "
                                 "truncated or replaced; make the data set again with python -m data_prep")

    def labels(self, split: str) -> np.ndarray:
        return np.load(self.path / f"{split}_labels.npy")

    def images(self, split: str) -> np.ndarray:
        """uint8 [N, H, W, 3], mapped from disk; never written back. For kind "arrays"."""
        # "c", copy on write: torch takes no array that is read-only without a warning
        return np.load(self.path / f"{split}_images.npy", mmap_mode="c")

    def paths(self, split: str) -> list[Path]:
        """Absolute path of each sample. For kind "files"."""
        lines = (self.path / f"{split}_files.txt").read_text().splitlines()
        return [Path(self.manifest.root) / line for line in lines]

    def beton(self, split: str) -> Path | None:
        name = f"{split}.beton"
        return self.path / name if name in self.manifest.files else None


def staged(path: Path) -> Path:
    """The copy of the data set at `path` on this node's own disk, or `path` where there is none, or not a whole one.

    NULSQ_SCRATCH says where copies lie. A copy has the very same manifest.json, and every file in its size.
    """
    scratch, file = os.environ.get(SCRATCH), path / "manifest.json"
    if not scratch or not file.is_file():
        return path
    text = file.read_bytes()
    copy = copy_of(Path(scratch), text)
    return copy if is_whole(copy, text) and copy.parent.stat().st_uid == os.getuid() else path


def copy_of(scratch: Path, manifest: bytes) -> Path:
    """Folder of the copy of a data set below `scratch`; `manifest` is the content of its manifest.json."""
    return scratch / f"nulsq-data-{os.getuid()}" / hashlib.sha256(manifest).hexdigest()[:16]


def is_whole(folder: Path, manifest: bytes) -> bool:
    """Whether a data set is there with this manifest.json and all its files in their sizes."""
    try:
        return (folder / "manifest.json").read_bytes() == manifest and all(
            (folder / name).stat().st_size == wanted.bytes for name, wanted in read(folder).files.items())
    except OSError:
        return False


class Watch:
    """Notices that a file is replaced or changed while it is in use: what is mapped from it would change unseen."""

    def __init__(self, path: Path):
        self.path = path
        self.before = self._identity()

    def look(self) -> None:
        """Raises InputError where the file is not the one that it was."""
        if self._identity() != self.before:
            raise InputError(f"{self.path} was replaced or changed while it was in use")

    def _identity(self):
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def write(manifest: Manifest, folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def describe_file(path: Path) -> DataFile:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    records = beton_format.read(path).digest if path.suffix == ".beton" else None
    return DataFile(path.stat().st_size, digest.hexdigest(), records)


def read(path: Path) -> Manifest:
    """The manifest of the data set in a folder. Raises InputError where there is none that can be used."""
    file = path / "manifest.json"
    if not file.is_file():
        raise InputError(f"{path} is not a prepared data set (no manifest.json); "
                         "make one with python -m data_prep digits|cifar10|cifar100|folder|imagenet --out DIR")
    try:
        content = json.loads(file.read_text())
        if content.get("format") != FORMAT:
            raise InputError(f"{file} has format {content.get('format')}, this version reads {FORMAT}")
        content["files"] = {name: DataFile(**entry) for name, entry in content["files"].items()}
        return Manifest(**content)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged: {error}") from None
