"""python -m data_prep bench DIR: images per second of every loader that can read a data set, by number of workers.

Each loader yields training batches with the usual augmentation: random resized crop and flip for photographs, crop and
flip for small images. Nothing is done with the batches. The first batch is timed separately, because FFCV compiles its
pipeline then. "memory" is how much the process grew.
"""

import importlib.util
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from nulsq.config import Data
from nulsq.data import DataSet, build_loaders
from nulsq.errors import InputError
from nulsq.text import markdown_table
from nulsq.training.memory import resident_bytes

LOADERS: tuple[Literal["ffcv", "torchvision", "device"], ...] = ("ffcv", "torchvision", "device")


def measure(path: Path, workers: list[int], size: int = 224, batch: int = 64, seconds: float = 5.0
            ) -> Iterator[dict[str, Any]]:
    """A row for each loader that can read the data set on this machine, and each number of workers.

    Loaders of small images run in the training process; they have one row, with 0 workers.
    """
    data = DataSet(path)
    photographs = data.storage == "files"
    for loader_name in LOADERS:
        if loader_name == "ffcv" and (importlib.util.find_spec("ffcv") is None or data.beton("train") is None) or \
                loader_name == "device" and photographs:
            continue
        for count in workers if loader_name == "ffcv" or photographs else [0]:
            recipe = Data(path=str(path), batch=min(batch, data.counts["train"]), loader=loader_name, workers=count,
                          crop="resized" if photographs else "pad", flip=True, size=size, holdout="none")
            yield {"loader": loader_name, "workers": count, **_rates(recipe, data, seconds)}


def _rates(recipe: Data, data: DataSet, seconds: float) -> dict[str, Any]:
    """Images per second over the first epochs that take `seconds`, at most three times as long."""
    memory, start = resident_bytes(), time.perf_counter()
    loader = build_loaders(recipe, data, 0).train
    rates: list[float] = []
    first_batch, measured_from, epoch = None, start, 0
    while not rates or time.perf_counter() - measured_from < seconds:
        last = time.perf_counter()
        for images, _, _ in loader.epoch(epoch):
            now = time.perf_counter()
            if first_batch is None:
                first_batch, measured_from = now - start, now
            else:
                rates.append(len(images) / (now - last))
            last = now
            if now - measured_from > 3 * seconds:
                break
        epoch += 1
    quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    return {"images_per_second": round(len(rates) * recipe.batch / sum(recipe.batch / rate for rate in rates), 1),
            "quartiles": [round(quartiles[0], 1), round(quartiles[2], 1)], "first_batch": round(first_batch or 0.0, 2),
            "megabytes": round((resident_bytes() - memory) / 2**20)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `measure` as Markdown."""
    cells = [["loader", "workers", "images/s", "quartiles of the batches", "first batch, s", "memory, MB"]]
    for row in rows:
        low, high = row["quartiles"]
        cells.append([row["loader"], str(row["workers"]), f"{row['images_per_second']:.0f}", f"{low:.0f} - {high:.0f}",
                      str(row["first_batch"]), str(row["megabytes"])])
    return "\n".join(markdown_table(cells))


def bench(path: Path, workers: list[int], size: int, batch: int, seconds: float) -> str:
    """The table for a data set. Raises InputError for a number of workers below 1."""
    if min(workers) < 1:
        raise InputError(f"--workers {min(workers)}, allowed: 1 and more")
    torch.set_num_threads(1)
    return table(list(measure(path, workers, size, batch, seconds)))
