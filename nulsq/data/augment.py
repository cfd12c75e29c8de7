"""Random crop and flip as pure functions of (seed, epoch, sample index).

No random number generator keeps a state. So a sample gets the same crop in every loader, with any number of workers and
ranks, and after a resume. Each function works on NumPy arrays and on scalars, and numba compiles it for FFCV.
"""

import math
from typing import Any

import numpy as np

# Multipliers and shifts of splitmix64 (Steele et al., OOPSLA 2014); DRAW is another odd multiplier.
GOLDEN, MIX_1, MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
DRAW = np.uint64(0xD1342543DE82EF95)
SHIFT_1, SHIFT_2, SHIFT_3, TO_53_BITS = (np.uint64(c) for c in (30, 27, 31, 11))
UNIT = 2.0**-53

# Numbers of a sample's draws. A resized crop uses RESIZED and those after it, four per attempt.
TOP, LEFT, FLIP, RESIZED = (np.uint64(c) for c in (0, 1, 2, 16))

# Random resized crop: ranges of the share of the area and of the aspect ratio, as usual for ImageNet.
SCALE = (0.08, 1.0)
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
ATTEMPTS = 10

Integers = Any  # uint64, a NumPy array or a scalar


def mix(x: Integers) -> Integers:
    """The finalizer of splitmix64, a bijection of 64 bits."""
    x = (x ^ (x >> SHIFT_1)) * MIX_1
    x = (x ^ (x >> SHIFT_2)) * MIX_2
    return x ^ (x >> SHIFT_3)


def uniform(seed: Integers, epoch: Integers, index: Integers, draw: Integers) -> Any:
    """Random number `draw` of a sample in an epoch, float64, uniform in [0, 1). All arguments are uint64."""
    x = mix(seed * GOLDEN + epoch)
    x = mix(x * GOLDEN + index)
    return (mix(x * DRAW + draw) >> TO_53_BITS) * UNIT


def crop_and_flip(seed: int, epoch: int, indices: np.ndarray, padding: int
                  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where to crop padded images, and which to flip: arrays (top, left, flip) of the shape of `indices`.

    top, left: int64 in 0..2 * padding, the crop's corner in the padded image. flip: bool.
    """
    seeds, epochs = np.array([seed], np.uint64), np.array([epoch], np.uint64)
    indices = indices.astype(np.uint64)
    top, left, flip = (uniform(seeds, epochs, indices, np.array([draw])) for draw in (TOP, LEFT, FLIP))
    offsets = 2 * padding + 1
    return (top * offsets).astype(np.int64), (left * offsets).astype(np.int64), flip < 0.5


def apply_crop_and_flip(images: np.ndarray, seed: int, epoch: int, indices: np.ndarray, padding: int,
                        flip: bool) -> np.ndarray:
    """Pad images [B, H, W, 3] with black, crop them back to H x W, and flip some if `flip`. Returns a new array."""
    top, left, flipped = crop_and_flip(seed, epoch, indices, padding)
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    out = np.empty_like(images)
    for i in range(len(images)):
        crop = padded[i, top[i]:top[i] + height, left[i]:left[i] + width]
        out[i] = crop[:, ::-1] if flip and flipped[i] else crop
    return out


def is_flipped(seed: Integers, epoch: Integers, index: Integers) -> Any:
    """Whether a photograph is flipped: the same draw as in `crop_and_flip`. Arguments are uint64 scalars."""
    return uniform(seed, epoch, index, FLIP) < 0.5


def resized_crop(seed: Integers, epoch: Integers, index: Integers, height: int, width: int
                 ) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop (Szegedy et al., CVPR 2015, arXiv:1409.4842).

    seed, epoch, index: uint64 scalars. If no attempt fits into the image, the largest central crop with an allowed
    aspect ratio is taken.
    """
    area = float(height) * float(width)
    draw = RESIZED
    for _ in range(ATTEMPTS):
        share = SCALE[0] + (SCALE[1] - SCALE[0]) * uniform(seed, epoch, index, draw)
        ratio = math.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0])
                         * uniform(seed, epoch, index, draw + np.uint64(1)))
        w = int(math.floor(math.sqrt(area * share * ratio) + 0.5))
        h = int(math.floor(math.sqrt(area * share / ratio) + 0.5))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(seed, epoch, index, draw + np.uint64(2)) * (height - h + 1))
            left = int(uniform(seed, epoch, index, draw + np.uint64(3)) * (width - w + 1))
            return top, left, h, w
        draw = draw + np.uint64(4)
    if width * 4 < height * 3:  # narrower than 3:4
        w, h = width, int(math.floor(width * 4 / 3 + 0.5))
    elif width * 3 > height * 4:  # wider than 4:3
        w, h = int(math.floor(height * 4 / 3 + 0.5)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop(height: int, width: int, ratio: float) -> tuple[int, int, int, int]:
    """(top, left, side, side) of the central square with `ratio` times the shorter side."""
    side = int(ratio * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side
