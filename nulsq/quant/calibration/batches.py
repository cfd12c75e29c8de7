"""Image batches in the forms in which users have them: what `calibrate_` and `reestimate_batch_norm_` take."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

IMAGE_KEYS = ("image", "images", "pixel_values")


def images_of(batches: Iterable[Any], device: torch.device | None = None) -> Iterator[Tensor]:
    """The image tensor of each batch, on `device` (None: where it is).

    A batch is an image tensor, a tuple or list that starts with one, or a mapping with `image`, `images` or
    `pixel_values`. A DataLoader yields such batches.

    Raises ValueError for anything else.
    """
    if isinstance(batches, Tensor):
        raise ValueError(f"batches is one tensor of shape {tuple(batches.shape)}: give a list of batches, [images]")
    for number, batch in enumerate(batches):
        images = batch
        if isinstance(batch, tuple | list) and batch:
            images = batch[0]
        elif hasattr(batch, "keys"):
            images = next((batch[key] for key in IMAGE_KEYS if key in batch.keys()), None)  # noqa: SIM118  any mapping
        if not isinstance(images, Tensor):
            keys = f" with the keys {', '.join(map(str, batch.keys()))}" if hasattr(batch, "keys") else ""
            raise ValueError(f"batch {number} is a {type(batch).__name__}{keys}, allowed: an image tensor, a tuple or "
                             f"list that starts with one, a mapping with {', '.join(IMAGE_KEYS)}")
        yield images if device is None else images.to(device)
