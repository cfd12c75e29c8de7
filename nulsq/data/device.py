"""The loader for data sets that fit in the device's memory: images lie there as uint8, batches are made there.

For arrays (small equal images). Pixels, order, crops and flips are those of the other loaders: the same arithmetic of
(seed, epoch, sample index), done on the host once an epoch and copied once an epoch. A step then only gathers: no copy
between host and device, no synchronization, no loop over images, no worker.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nulsq.data.augment import crop_and_flip
from nulsq.data.manifest import DataSet
from nulsq.data.order import Order
from nulsq.data.view import View


class DeviceLoader:
    """Yields (images uint8 [B, 3, H, W], labels int64 [B], indices int64 [B]), all on `device`, for each step."""

    def __init__(self, data: DataSet, split: str, order: Order, view: View, device: torch.device, used: np.ndarray):
        """`used`: sorted indices of the images that any epoch may show; only these are brought to the device."""
        self.order, self.view, self.device, self.used = order, view, device, used
        self.steps = len(order(0))
        images = np.ascontiguousarray(data.images(split)[used])
        self.padding = view.padding if view.crop == "pad" else 0
        _, self.height, self.width, _ = images.shape
        edge = (self.padding, self.padding)
        padded = np.pad(images, ((0, 0), edge, edge, (0, 0))) if self.padding else images
        self.area, self.row = padded.shape[1] * padded.shape[2], padded.shape[2]
        self.pixels = torch.from_numpy(padded).view(-1, 3).to(device)
        self.labels = torch.from_numpy(data.labels(split)[used]).to(device)
        self.grids = self._grids()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self.order(epoch)[start_step:]
        if not batches:
            return
        indices = np.concatenate(batches)
        position = np.searchsorted(self.used, indices)
        top, left, flipped = crop_and_flip(self.view.seed, epoch, indices, self.padding)
        first = position * self.area + top * self.row + left  # pixel of the crop's corner
        flipped = flipped.astype(np.int64) * self.view.flip
        on_device = torch.from_numpy(np.stack([indices, position, first, flipped])).to(self.device)
        for part in on_device.split([len(batch) for batch in batches], dim=1):
            sample, position, first, flipped = part
            pixels = first[:, None] + self.grids.index_select(0, flipped)
            images = self.pixels.index_select(0, pixels.view(-1)).view(-1, self.height, self.width, 3)
            yield images.permute(0, 3, 1, 2), self.labels.index_select(0, position), sample

    def _grids(self):
        """[2, H * W]: where the pixels of a crop lie, seen from its corner; and the same mirrored."""
        columns = torch.arange(self.width)
        rows = torch.arange(self.height)[:, None] * self.row
        return torch.stack([(rows + columns).flatten(), (rows + columns.flip(0)).flatten()]).to(self.device)


def bytes_needed(data: DataSet, padding: int) -> int:
    """Of all training images with their padding, as they would lie on the device."""
    count, height, width, channels = data.images("train").shape
    return count * (height + 2 * padding) * (width + 2 * padding) * channels
