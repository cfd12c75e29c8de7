"""python -m data_prep check DIR: is a data set as it was written? Sizes, checksums, counts, labels."""

from pathlib import Path

import numpy as np

from nulsq.data.manifest import SPLITS, DataSet, describe_file
from nulsq.errors import InputError


def check(path: Path) -> str:
    """A line that says all is well. Raises InputError naming the first file that is not as written."""
    data = DataSet(path)  # files are there, with their sizes
    for name, wanted in data.files.items():
        if describe_file(path / name) != wanted:
            raise InputError(f"{path / name}: the checksum is not the one that it was written with")
    for split in SPLITS:
        labels = data.labels(split)
        if len(labels) != data.counts[split]:
            raise InputError(f"{path}: {len(labels)} {split} labels, the manifest counts {data.counts[split]}")
        if labels.min() < 0 or labels.max() >= len(data.classes):
            raise InputError(f"{path}: {split} labels outside 0..{len(data.classes) - 1}")
        missing = np.setdiff1d(np.arange(len(data.classes)), labels)
        if len(missing):
            raise InputError(f"{path}: no {split} image of class {data.classes[missing[0]]}")
    counts = ", ".join(f"{data.counts[split]} {split}" for split in SPLITS)
    return f"{path}: {counts} images, {len(data.classes)} classes, {len(data.files)} files as written"
