"""CIFAR-10 and CIFAR-100 from the standard python batches, as torchvision leaves them on disk, or downloaded by it."""

from pathlib import Path

import numpy as np

from data_prep.progress import without_foreign_bars
from data_prep.writing import write_arrays
from nulsq.errors import InputError, require


def prepare(out: Path, name: str, source: Path | None) -> Path:
    """`name` is cifar10 or cifar100; `source` holds `cifar-10-batches-py` (or is it); None downloads."""
    datasets = require("torchvision.datasets", "train")
    archive = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    download = source is None
    root = out.parent / f"{name}-download" if download else source
    if not download and source.name == archive.base_folder:
        root = source.parent
    if download:
        print(f"downloading {archive.url}", flush=True)
    try:
        with without_foreign_bars():
            splits = {"train": archive(str(root), train=True, download=download),
                      "test": archive(str(root), train=False, download=download)}
    except Exception as error:
        if download:
            raise InputError(f"{name} could not be downloaded ({error}); "
                             f"give --source with {archive.base_folder}") from None
        raise InputError(f"{root} does not hold {archive.base_folder} with the published checksums: {error}") from None
    return write_arrays(out, name=name, classes=list(splits["train"].classes), source=str(source or archive.url),
                        images={split: data.data for split, data in splits.items()},
                        labels={split: np.array(data.targets) for split, data in splits.items()})
