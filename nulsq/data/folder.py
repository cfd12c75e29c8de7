"""The loader that needs no FFCV: arrays in memory order, or photographs decoded by Pillow and torchvision."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nulsq.data.augment import apply_crop_and_flip, center_crop, is_flipped, resized_crop
from nulsq.data.manifest import DataSet, Watch
from nulsq.data.order import Order
from nulsq.data.photograph import read_rgb
from nulsq.data.transform import View
from nulsq.errors import InputError, require


class FolderLoader:
    """Yields (images uint8 [B, 3, H, W], labels int64 [B], indices int64 [B]) for each step of an epoch."""

    def __init__(self, data: DataSet, split: str, order: Order, view: View, workers: int = 0, patience: float = 300):
        self.order, self.view, self.workers, self.patience = order, view, workers, patience
        self.labels = torch.from_numpy(data.labels(split))
        self.steps = len(order(0))
        if data.kind == "arrays":
            self.images = data.images(split)
            self.watch = Watch(data.path / f"{split}_images.npy")
        else:
            self.images = None
            self.paths = data.paths(split)
            if self.paths and not self.paths[0].is_file():
                raise InputError(f"{self.paths[0]} is missing: the photographs of {data.path} moved; "
                                 "prepare the data set again from where they are now")

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self.order(epoch)[start_step:]
        pixels = self._arrays(batches, epoch) if self.images is not None else self._photographs(batches, epoch)
        for indices, images in zip(batches, pixels, strict=True):
            indices = torch.from_numpy(indices)
            yield images, self.labels[indices], indices

    def _arrays(self, batches, epoch):
        view = self.view
        for indices in batches:
            self.watch.look()
            images = np.ascontiguousarray(self.images[indices])
            if view.crop == "pad" or view.flip:
                padding = view.border
                images = apply_crop_and_flip(images, view.seed, epoch, indices, padding, view.flip)
            yield torch.from_numpy(images).permute(0, 3, 1, 2)

    def _photographs(self, batches, epoch):
        photographs = _Photographs(self.paths, self.view, epoch)
        loader = torch.utils.data.DataLoader(photographs, batch_sampler=batches, num_workers=self.workers,
                                             timeout=self.patience if self.workers else 0)
        try:
            yield from loader
        except (InputError, RuntimeError) as error:  # out of a worker it comes with the worker's traceback
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise InputError(lines[-1].removeprefix("nulsq.errors.InputError: ") if lines else repr(error)) from None


class _Photographs(torch.utils.data.Dataset):
    def __init__(self, paths, view, epoch):
        self.paths, self.view, self.epoch = paths, view, epoch
        self.functional = require("torchvision.transforms.functional", "train")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        view = self.view
        try:
            image = read_rgb(self.paths[index])
        except InputError as error:
            raise InputError(f"sample {index} is damaged: {error}") from None
        key = (np.uint64(view.seed), np.uint64(self.epoch), np.uint64(index))
        with np.errstate(over="ignore"):  # 64-bit arithmetic is meant to wrap
            if view.crop == "resized":
                box = resized_crop(*key, image.height, image.width)
            else:
                box = center_crop(image.height, image.width, view.ratio)
            flip = view.flip and is_flipped(*key)
        image = self.functional.resized_crop(image, *box, [view.size_at(self.epoch)] * 2, antialias=True)
        if flip:
            image = self.functional.hflip(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
