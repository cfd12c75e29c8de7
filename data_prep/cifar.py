"""CIFAR-10 and CIFAR-100 from the standard Python batches, from a folder or downloaded by torchvision."""

from pathlib import Path

import numpy as np

from data_prep.progress import without_foreign_bars
from data_prep.writing import write_arrays
from nulsq.errors import InputError, require


def prepare(out: Path, name: str, source: Path | None) -> Path:
    """Write the data set `name` ("cifar10" or "cifar100") to the folder `out`; returns it.

    source: the folder `cifar-10-batches-py` (or `cifar-100-python`), or the one that contains it; None downloads it
    next to `out`. Raises InputError if the images are not there or have other checksums than the published ones.
    """
    datasets = require("torchvision.datasets", "train")
    archive = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    if source is None:
        root = out.parent / f"{name}-download"
        print(f"downloading {archive.url}", flush=True)
    else:
        root = source.parent if source.name == archive.base_folder else source
    try:
        with without_foreign_bars():
            splits = {"train": archive(str(root), train=True, download=source is None),
                      "test": archive(str(root), train=False, download=source is None)}
    except Exception as error:
        if source is None:
            raise InputError(f"{name} could not be downloaded ({error}); "
                             f"give --source with {archive.base_folder}") from None
        raise InputError(f"{root} does not hold {archive.base_folder} with the published checksums: {error}") from None
    return write_arrays(out, name=name, classes=list(splits["train"].classes), source=str(source or archive.url),
                        images={split: data.data for split, data in splits.items()},
                        labels={split: np.array(data.targets) for split, data in splits.items()})
