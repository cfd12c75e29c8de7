"""python -m data_prep bench DIR: images per second that each loader gives, by cores.

A step's worth of images after another, with the recipe's random resized crop and flip (photographs) or crop and flip
(small images), nothing done with them. The first epoch is timed apart: FFCV compiles in it. Memory is what the process
grew by.
"""

import importlib.util
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from nulsq.config import Data
from nulsq.data import DataSet, build_loaders
from nulsq.errors import InputError
from nulsq.training.memory import resident_bytes


def measure(path: Path, workers: list[int], size: int = 224, batch: int = 64, seconds: float = 5.0,
            kinds: tuple[str, ...] = ("ffcv", "torchvision", "device")) -> Iterator[dict]:
    """A row for each loader and number of workers: kind, workers, images_per_second, quartiles, first_batch, megabytes.

    A loader that the data set cannot be read with here has no row.
    """
    data = DataSet(path)
    for kind in kinds:
        if kind == "ffcv" and (importlib.util.find_spec("ffcv") is None or data.beton("train") is None) or \
                kind == "device" and data.kind != "arrays":
            continue
        for count in [0] if kind == "device" or kind == "torchvision" and data.kind == "arrays" else workers:
            files = data.kind == "files"
            recipe = Data(path=str(path), batch=min(batch, data.counts["train"]), loader=kind, workers=count,
                          crop="resized" if files else "pad", flip=True, size=size, holdout="none")
            yield {"kind": kind, "workers": count, **_rate(recipe, data, seconds)}


def _rate(recipe, data, seconds):
    before, began = resident_bytes(), time.perf_counter()
    train, rates, epoch, first = build_loaders(recipe, data, 0).train, [], 0, None
    total = time.perf_counter()
    while not rates or time.perf_counter() - total < seconds:
        last = time.perf_counter()
        for images, _, _ in train.epoch(epoch):
            now = time.perf_counter()
            if first is None:
                first, total = now - began, now
            else:
                rates.append(len(images) / (now - last))
            last = now
            if now - total > 3 * seconds:
                break
        epoch += 1
    ends = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    return {"images_per_second": round(len(rates) * recipe.batch / sum(recipe.batch / rate for rate in rates), 1),
            "quartiles": [round(ends[0], 1), round(ends[2], 1)], "first_batch": round(first, 2),
            "megabytes": round((resident_bytes() - before) / 2**20)}


def table(rows: list[dict]) -> str:
    lines = ["| loader | workers | images/s | quartiles of the batches | first batch, s | memory, MB |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(f"| {row['kind']} | {row['workers']} | {row['images_per_second']:.0f} | {low:.0f} - {high:.0f} | "
                     f"{row['first_batch']} | {row['megabytes']} |")
    return "\n".join(lines)


def bench(path: Path, workers: list[int], size: int, batch: int, seconds: float) -> str:
    if min(workers) < 1:
        raise InputError(f"--workers {min(workers)}, allowed: 1 and more")
    torch.set_num_threads(1)
    return table(list(measure(path, workers, size, batch, seconds)))
