"""The loader for small images that fit into memory: on a GPU they are copied there once, and batches are made there.

Its batches equal those of the other loaders bit for bit, because order, crops and flips are the same functions of
(seed, epoch, sample index). The host computes them once per epoch and copies them once per epoch. A step then only
gathers: it copies nothing from the host, does not synchronize, loops over no images and needs no worker process. On the
CPU the images stay mapped from disk.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nulsq.data.augment import crop_and_flip
from nulsq.data.manifest import DataSet, FileWatch
from nulsq.data.order import Order
from nulsq.data.transform import Transform


class MemoryLoader:
    """Yields (images uint8 [B, 3, H, W], labels int64 [B], indices int64 [B]) for each step, all on `device`."""

    def __init__(self, data: DataSet, split: str, order: Order, transform: Transform, device: torch.device,
                 used: np.ndarray | None = None):
        """`used`: indices of all samples that any epoch contains; only these are copied to the device. None: all."""
        self.order, self.transform, self.device = order, transform, device
        self.watch = FileWatch(data.path / f"{split}_images.npy")
        self.steps = len(order(0))
        self.padding = transform.border
        images, labels = data.images(split), data.labels(split)
        self.rows = np.arange(len(labels))  # row of each sample in `self.images`
        if used is not None:
            self.rows[:] = -1  # not there: index_select raises an error
            self.rows[used] = np.arange(len(used))
            images, labels = images[used], labels[used]
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.height, self.width = images.shape[1:3]
        self.line_offsets = torch.arange(self.height, device=device) * (self.width + 2 * self.padding)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self.order(epoch)[start_step:]
        if not batches:
            return
        plan = torch.from_numpy(self._plan(batches, epoch)).to(self.device)
        for indices, rows, corners in plan.split([len(batch) for batch in batches], dim=1):
            if self.device.type == "cpu":  # the images are mapped from disk
                self.watch.raise_if_changed()
            images = self.images.index_select(0, rows)
            if self.padding or self.transform.flip:
                images = self._crop_and_flip(images, corners)
            yield images.permute(0, 3, 1, 2), self.labels.index_select(0, rows), indices

    def _plan(self, batches: list[np.ndarray], epoch: int) -> np.ndarray:
        """int64 [3, images of the epoch]: sample index, row in `self.images`, corner of the crop.

        The corner is the index of a pixel in the padded batch, which `_crop_and_flip` lays out.
        """
        indices, padding = np.concatenate(batches), self.padding
        plan = np.zeros((3, len(indices)), np.int64)
        plan[:2] = indices, self.rows[indices]
        if padding or self.transform.flip:
            top, left, flipped = crop_and_flip(self.transform.seed, epoch, indices, padding)
            flipped &= self.transform.flip
            left = np.where(flipped, 2 * padding - left, left)
            sizes = np.concatenate([np.full(len(batch), len(batch)) for batch in batches])
            image = np.concatenate([np.arange(len(batch)) for batch in batches]) + sizes * flipped
            plan[2] = (image * (self.height + 2 * padding) + top) * (self.width + 2 * padding) + left
        return plan

    def _crop_and_flip(self, images: Tensor, corners: Tensor) -> Tensor:
        """Crop and flip images [B, H, W, 3]: pad the batch, append its mirror image, and gather lines of pixels.

        This is faster than selecting mirrored images by a mask, and keeps no padded copy of the data set.
        """
        images = F.pad(images, (0, 0) + 4 * (self.padding,))
        if self.transform.flip:
            images = torch.cat([images, images.flip(2)])
        lines = images.flatten().unfold(0, 3 * self.width, 3)  # the line that starts at each pixel; a view
        chosen = corners[:, None] + self.line_offsets
        return lines.index_select(0, chosen.flatten()).view(-1, self.height, self.width, 3)
