"""The loader that needs no FFCV: small images from memory, or photographs decoded by Pillow and torchvision."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nulsq.data.augment import apply_crop_and_flip, center_crop, is_flipped, resized_crop
from nulsq.data.manifest import DataSet, FileWatch
from nulsq.data.order import Order
from nulsq.data.photograph import read_rgb
from nulsq.data.transform import Transform
from nulsq.errors import InputError, require


class FolderLoader:
    """Yields (images uint8 [B, 3, H, W], labels int64 [B], indices int64 [B]) for each step of an epoch."""

    def __init__(self, data: DataSet, split: str, order: Order, transform: Transform, workers: int = 0,
                 patience: float = 300):
        """workers: processes that decode photographs; 0 decodes in this one. patience: seconds to wait for a batch."""
        self.order, self.transform, self.workers, self.patience = order, transform, workers, patience
        self.labels = torch.from_numpy(data.labels(split))
        self.steps = len(order(0))
        if data.storage == "arrays":
            self.images: np.ndarray | None = data.images(split)
            self.watch = FileWatch(data.path / f"{split}_images.npy")
        else:
            self.images = None
            self.paths = data.paths(split)
            if self.paths and not self.paths[0].is_file():
                raise InputError(f"{self.paths[0]} is missing: the photographs of {data.path} moved; "
                                 "prepare the data set again from where they are now")

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self.order(epoch)[start_step:]
        pixels = self._photographs(batches, epoch) if self.images is None else \
            self._arrays(self.images, batches, epoch)
        for batch, images in zip(batches, pixels, strict=True):
            indices = torch.from_numpy(batch)
            yield images, self.labels[indices], indices

    def _arrays(self, stored: np.ndarray, batches: list[np.ndarray], epoch: int) -> Iterator[Tensor]:
        transform = self.transform
        for indices in batches:
            self.watch.raise_if_changed()
            images = np.ascontiguousarray(stored[indices])
            if transform.crop == "pad" or transform.flip:
                images = apply_crop_and_flip(images, transform.seed, epoch, indices, transform.border, transform.flip)
            yield torch.from_numpy(images).permute(0, 3, 1, 2)

    def _photographs(self, batches: list[np.ndarray], epoch: int) -> Iterator[Tensor]:
        photographs = _Photographs(self.paths, self.transform, epoch)
        loader = torch.utils.data.DataLoader(
            photographs, batch_sampler=batches, num_workers=self.workers,  # type: ignore[arg-type]
            timeout=self.patience if self.workers else 0)
        try:
            yield from loader
        except (InputError, RuntimeError) as error:  # from a worker process it carries that process's traceback
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise InputError(lines[-1].removeprefix("nulsq.errors.InputError: ") if lines else repr(error)) from None


class _Photographs(torch.utils.data.Dataset):
    """Transformed photographs of one epoch, uint8 [3, size, size]."""

    def __init__(self, paths: list[Path], transform: Transform, epoch: int):
        self.paths, self.transform, self.epoch = paths, transform, epoch
        self.functional = require("torchvision.transforms.functional", "train")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        transform = self.transform
        try:
            image = read_rgb(self.paths[index])
        except InputError as error:
            raise InputError(f"sample {index} is damaged: {error}") from None
        key = (np.uint64(transform.seed), np.uint64(self.epoch), np.uint64(index))
        with np.errstate(over="ignore"):  # 64-bit integers are meant to wrap
            if transform.crop == "resized":
                box = resized_crop(*key, image.height, image.width)
            else:
                box = center_crop(image.height, image.width, transform.ratio)
            flip = transform.flip and is_flipped(*key)
        image = self.functional.resized_crop(image, *box, [transform.size_at(self.epoch)] * 2, antialias=True)
        if flip:
            image = self.functional.hflip(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
