"""build_loaders(recipe, data, seed, rank, size, device): the loaders of a run, all behind one interface.

    loader.steps                             steps per epoch on this rank
    for images, labels, indices in loader.epoch(epoch, start_step=0): ...

Images are uint8 [B, 3, H, W] whatever the loader; `normalize` is the one place where they become floats. Which loader
it is, `data.loader` says: FFCV, torchvision, or the device, for small images that fit in its memory.
"""

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nulsq.config import Data
from nulsq.data.folder import FolderLoader
from nulsq.data.manifest import DataSet
from nulsq.data.memory_loader import DeviceLoader
from nulsq.data.order import sharded, shuffled, split, subset
from nulsq.data.transform import View
from nulsq.errors import InputError, missing


@dataclass
class Loaders:
    train: object
    val: object | None  # None where the recipe holds nothing out
    kind: str  # "ffcv", "torchvision" or "device"


class Normalize:
    """uint8 images to (x / 255 - mean) / std in float32, on `device`."""

    def __init__(self, data: DataSet, device: torch.device, channels_last: bool = True):
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1) * 255
        self.scale = 1 / (torch.tensor(data.std, device=device).view(1, 3, 1, 1) * 255)
        self.device = device
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()  # the copy then runs beside the step before
        x = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=self.format)
        return x.sub_(self.mean).mul_(self.scale)


CPU = torch.device("cpu")


def check_data(recipe: Data, data: DataSet, size: int = 1, device: torch.device = CPU, file: str = "train") -> str:
    """What has to fit before a run starts; returns the kind of the loader of `file`. Raises InputError."""
    if recipe.crop == "pad" and data.kind != "arrays":
        raise InputError("data.crop = pad is for small equal images (arrays); photographs take resized")
    if recipe.crop == "resized" and data.kind != "files":
        raise InputError("data.crop = resized is for photographs; small equal images take pad")
    train, val = split(data.labels("train"), recipe.holdout, recipe.holdout_seed)
    shuffled(subset(train, recipe.subset, recipe.holdout_seed), recipe.batch, 0, 0, size)
    has_ffcv = importlib.util.find_spec("ffcv") is not None
    if recipe.loader == "torchvision":
        return recipe.loader
    if recipe.loader == "device" and data.kind != "arrays":
        raise InputError(f"data.loader = device is for small equal images (arrays), {data.path} has photographs; "
                         "allowed for them: auto, ffcv, torchvision")
    if recipe.loader in ("auto", "device") and data.kind == "arrays":
        needed, room = data.images(file).nbytes, _room(device)
        if needed <= room:
            return "device"
        if recipe.loader == "device":
            raise InputError(f"data.loader = device: the images need {needed / 1e9:.2f} GB, half of what is free on "
                             f"{device} is {room / 1e9:.2f} GB; allowed: auto, ffcv, torchvision")
    if recipe.loader == "ffcv":
        if not has_ffcv:  # looked up, not imported: importing ffcv changes torch's number of threads
            raise missing("ffcv", "ffcv")
        if data.beton("train") is None:
            raise InputError(f"{data.path} has no train.beton (it was prepared without ffcv); "
                             "prepare it again, or set data.loader=torchvision")
    return "ffcv" if has_ffcv and data.beton("train") else "torchvision"


def _room(device):
    """Bytes that images may take on a device: half of what is free there. The CPU's stay mapped from disk."""
    if device.type == "cpu":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next tensors
    return (torch.cuda.mem_get_info(device)[0] + kept) // 2


def build_loaders(recipe: Data, data: DataSet, seed: int, rank: int = 0, size: int = 1,
                  device: torch.device = CPU, epochs: int | None = None) -> Loaders:
    """Training and holdout loaders of this rank. Never opens the test images.

    `epochs`: of the whole training. Images that grow (data.start_size) need it; ValueError where it is missing then.
    """
    if recipe.start_size is not None and epochs is None:
        raise ValueError("data.start_size grows over the training: build_loaders needs its number of epochs")
    kind = check_data(recipe, data, size, device)
    labels = data.labels("train")
    train, val = split(labels, recipe.holdout, recipe.holdout_seed)
    train = subset(train, recipe.subset, recipe.holdout_seed)
    view = View(seed, recipe.crop, recipe.padding, recipe.flip, recipe.size, recipe.eval_ratio, recipe.start_size,
                (recipe.ramp_start, recipe.ramp_end), epochs or 1)
    order = shuffled(train, recipe.batch, seed, rank, size, recipe.window if recipe.order == "quasi" else None)
    return Loaders(
        train=_loader(kind, data, "train", order, view, recipe, device, train),
        val=_evaluation(kind, data, "train", val, recipe, rank, size, device) if len(val) else None,
        kind=kind,
    )


def build_loader(recipe: Data, data: DataSet, which: str, rank: int = 0, size: int = 1, device: torch.device = CPU):
    """An evaluation loader alone: `which` is "test" or "val". Every image once over all ranks."""
    kind = check_data(recipe, data, 1, device, "test" if which == "test" else "train")
    if which == "test":
        indices = torch.arange(data.counts["test"]).numpy()
        return _evaluation(kind, data, "test", indices, recipe, rank, size, device)
    _, val = split(data.labels("train"), recipe.holdout, recipe.holdout_seed)
    if not len(val):
        raise InputError("the recipe holds nothing out (data.holdout = none): there is no val")
    return _evaluation(kind, data, "train", val, recipe, rank, size, device)


def _evaluation(kind, data, file, indices, recipe, rank, size, device):
    view = View(0, "none", 0, False, recipe.eval_size or recipe.size, recipe.eval_ratio)
    order = sharded(indices, recipe.batch, rank, size)
    return _loader(kind, data, file, order, view, recipe, device, indices[rank::size])


def _loader(kind, data, file, order, view, recipe, device, used):
    if kind == "device":
        return DeviceLoader(data, file, order, view, device, None if device.type == "cpu" else used)
    if kind == "torchvision":
        return FolderLoader(data, file, order, view, recipe.workers, recipe.patience)
    from nulsq.data.beton import BetonLoader
    return BetonLoader(data, file, order, view, recipe.workers, recipe.patience)
