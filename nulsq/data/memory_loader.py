"""The loader for data sets that fit in the device's memory: images lie there as uint8, batches are made there.

For arrays (small equal images). Pixels, order, crops and flips are those of the other loaders: the same arithmetic of
(seed, epoch, sample index), done on the host once an epoch and copied once an epoch. A step then only gathers: no copy
between host and device, no synchronization, no loop over images, no worker. On the CPU the images stay where they are,
mapped from disk.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nulsq.data.augment import crop_and_flip
from nulsq.data.manifest import DataSet, Watch
from nulsq.data.order import Order
from nulsq.data.transform import View


class DeviceLoader:
    """Yields (images uint8 [B, 3, H, W], labels int64 [B], indices int64 [B]), all on `device`, for each step."""

    def __init__(self, data: DataSet, split: str, order: Order, view: View, device: torch.device,
                 used: np.ndarray | None = None):
        """`used`: indices of the images that any epoch may show; only these are brought to the device. None: all."""
        self.order, self.view, self.device = order, view, device
        self.watch = Watch(data.path / f"{split}_images.npy")
        self.steps = len(order(0))
        self.padding = view.border
        images, labels = data.images(split), data.labels(split)
        self.place = np.arange(len(labels))  # of each sample in `self.images`
        if used is not None:
            self.place[:] = -1  # no image: asking for it is an error
            self.place[used] = np.arange(len(used))
            images, labels = images[used], labels[used]
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.height, self.width = images.shape[1:3]
        self.rows = torch.arange(self.height, device=device) * (self.width + 2 * self.padding)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self.order(epoch)[start_step:]
        if not batches:
            return
        plan = torch.from_numpy(self._plan(batches, epoch)).to(self.device)
        for sample, place, corner in plan.split([len(batch) for batch in batches], dim=1):
            if self.device.type == "cpu":  # they are on disk
                self.watch.look()
            images = self.images.index_select(0, place)
            if self.padding or self.view.flip:
                images = self._crop_and_flip(images, corner)
            yield images.permute(0, 3, 1, 2), self.labels.index_select(0, place), sample

    def _plan(self, batches, epoch):
        """int64 [3, images]: sample index, place, and where the crop's corner is in what `_crop_and_flip` lays out."""
        indices, padding = np.concatenate(batches), self.padding
        plan = np.zeros((3, len(indices)), np.int64)
        plan[:2] = indices, self.place[indices]
        if padding or self.view.flip:
            top, left, flipped = crop_and_flip(self.view.seed, epoch, indices, padding)
            flipped &= self.view.flip
            left = np.where(flipped, 2 * padding - left, left)
            sizes = np.concatenate([np.full(len(batch), len(batch)) for batch in batches])
            image = np.concatenate([np.arange(len(batch)) for batch in batches]) + sizes * flipped
            plan[2] = (image * (self.height + 2 * padding) + top) * (self.width + 2 * padding) + left
        return plan

    def _crop_and_flip(self, images, corner):
        """Each row of a crop is one piece of the padded batch or of its mirror image, and is gathered as such.

        Padding and mirroring a batch costs less than selecting by a mask, and no memory for a padded data set.
        """
        images = F.pad(images, (0, 0) + 4 * (self.padding,))
        if self.view.flip:
            images = torch.cat([images, images.flip(2)])
        pieces = images.flatten().unfold(0, 3 * self.width, 3)  # the piece that starts at each pixel; no copy
        rows = corner[:, None] + self.rows
        return pieces.index_select(0, rows.flatten()).view(-1, self.height, self.width, 3)
