"""build_loaders(recipe, data, seed, rank, size, device): the loaders of a run. All of them have one interface:

    loader.steps                             steps per epoch on this rank
    for images, labels, indices in loader.epoch(epoch, start_step=0): ...

Every loader yields uint8 images [B, 3, H, W]; `Normalize` makes them float. The setting `data.loader` chooses between
"ffcv", "torchvision" and "device", which is the loader for small images that fit into memory.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nulsq.config import Data
from nulsq.data.folder import FolderLoader
from nulsq.data.manifest import DataSet
from nulsq.data.memory_loader import MemoryLoader
from nulsq.data.order import Order, sharded, shuffled, split, subset
from nulsq.data.transform import Transform
from nulsq.errors import InputError, missing


class Loader(Protocol):
    """What training and evaluation use of a loader."""

    steps: int  # per epoch on this rank

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (images uint8 [B, 3, H, W], labels int64 [B], sample indices int64 [B]) of each step."""


@dataclass
class Loaders:
    train: Loader
    val: Loader | None  # None if the recipe holds nothing out
    loader_name: str  # "ffcv", "torchvision" or "device"


class Normalize:
    """uint8 images [B, 3, H, W] -> (x / 255 - mean) / std, float32 on `device`."""

    def __init__(self, data: DataSet, device: torch.device, channels_last: bool = True):
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1) * 255
        self.scale = 1 / (torch.tensor(data.std, device=device).view(1, 3, 1, 1) * 255)
        self.device = device
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # lets the copy overlap with the previous step
        x = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=self.format)
        return x.sub_(self.mean).mul_(self.scale)


CPU = torch.device("cpu")


def check_data(recipe: Data, data: DataSet, size: int = 1, device: torch.device = CPU,
               split_name: str = "train") -> str:
    """Check the recipe against the data set before a run starts, and choose the loader of a split's images.

    Returns "ffcv", "torchvision" or "device". Raises InputError.
    """
    if recipe.crop == "pad" and data.storage != "arrays":
        raise InputError("data.crop = pad is for small equal images (arrays); photographs take resized")
    if recipe.crop == "resized" and data.storage != "files":
        raise InputError("data.crop = resized is for photographs; small equal images take pad")
    train, _ = split(data.labels("train"), recipe.holdout, recipe.holdout_seed)
    shuffled(subset(train, recipe.subset, recipe.holdout_seed), recipe.batch, 0, 0, size)
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    if recipe.loader == "torchvision":
        return recipe.loader
    if recipe.loader == "device" and data.storage != "arrays":
        raise InputError(f"data.loader = device is for small equal images (arrays), {data.path} has photographs; "
                         "allowed for them: auto, ffcv, torchvision")
    if recipe.loader in ("auto", "device") and data.storage == "arrays":
        needed, allowed = data.images(split_name).nbytes, _allowed_bytes(device)
        if needed <= allowed:
            return "device"
        if recipe.loader == "device":
            raise InputError(f"data.loader = device: the images need {needed / 1e9:.2f} GB, half of what is free on "
                             f"{device} is {allowed / 1e9:.2f} GB; allowed: auto, ffcv, torchvision")
    if recipe.loader == "ffcv":
        if not has_ffcv:  # find_spec does not import it: importing ffcv changes torch's number of threads
            raise missing("ffcv", "ffcv")
        if data.beton("train") is None:
            raise InputError(f"{data.path} has no train.beton (it was prepared without ffcv); "
                             "prepare it again, or set data.loader=torchvision")
    return "ffcv" if has_ffcv and data.beton("train") else "torchvision"


def _allowed_bytes(device: torch.device) -> float:
    """Memory that images may take on a device: half of what is free. On the CPU they stay mapped from disk."""
    if device.type == "cpu":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch reuses it
    return (torch.cuda.mem_get_info(device)[0] + cached) // 2


def build_loaders(recipe: Data, data: DataSet, seed: int, rank: int = 0, size: int = 1,
                  device: torch.device = CPU, epochs: int | None = None) -> Loaders:
    """Training and holdout loaders of one of `size` ranks. Never opens the test images.

    `epochs` is the length of the training, which images that grow (data.start_size) depend on. Raises InputError, and
    ValueError where such images are wanted without `epochs`.
    """
    if recipe.start_size is not None and epochs is None:
        raise ValueError("data.start_size grows over the training: build_loaders needs its number of epochs")
    loader_name = check_data(recipe, data, size, device)
    train, val = split(data.labels("train"), recipe.holdout, recipe.holdout_seed)
    train = subset(train, recipe.subset, recipe.holdout_seed)
    transform = Transform(seed, recipe.crop, recipe.padding, recipe.flip, recipe.size, recipe.eval_ratio,
                          recipe.start_size, (recipe.ramp_start, recipe.ramp_end), epochs or 1)
    order = shuffled(train, recipe.batch, seed, rank, size, recipe.window if recipe.order == "quasi" else None)
    return Loaders(
        train=_loader(loader_name, data, "train", order, transform, recipe, device, train),
        val=_evaluation_loader(loader_name, data, "train", val, recipe, rank, size, device) if len(val) else None,
        loader_name=loader_name,
    )


def build_loader(recipe: Data, data: DataSet, which: str, rank: int = 0, size: int = 1,
                 device: torch.device = CPU) -> Loader:
    """A loader for evaluation only, of the test images ("test") or of the holdout ("val").

    Each image comes once on one of the ranks. Raises InputError if the recipe holds nothing out.
    """
    loader_name = check_data(recipe, data, 1, device, "test" if which == "test" else "train")
    if which == "test":
        indices = np.arange(data.counts["test"])
        return _evaluation_loader(loader_name, data, "test", indices, recipe, rank, size, device)
    _, val = split(data.labels("train"), recipe.holdout, recipe.holdout_seed)
    if not len(val):
        raise InputError("the recipe holds nothing out (data.holdout = none): there is no val")
    return _evaluation_loader(loader_name, data, "train", val, recipe, rank, size, device)


def _evaluation_loader(loader_name: str, data: DataSet, split_name: str, indices: np.ndarray, recipe: Data, rank: int,
                       size: int, device: torch.device) -> Loader:
    transform = Transform(0, "none", 0, False, recipe.eval_size or recipe.size, recipe.eval_ratio)
    order = sharded(indices, recipe.batch, rank, size)
    return _loader(loader_name, data, split_name, order, transform, recipe, device, indices[rank::size])


def _loader(loader_name: str, data: DataSet, split_name: str, order: Order, transform: Transform, recipe: Data,
            device: torch.device, used: np.ndarray) -> Loader:
    if loader_name == "device":
        return MemoryLoader(data, split_name, order, transform, device, None if device.type == "cpu" else used)
    if loader_name == "torchvision":
        return FolderLoader(data, split_name, order, transform, recipe.workers, recipe.patience)
    from nulsq.data.beton import BetonLoader  # imports ffcv
    return BetonLoader(data, split_name, order, transform, recipe.workers, recipe.patience)
