"""Random crop and flip as arithmetic: pure functions of (seed, epoch, sample index).

No generator has a state, so the same sample gets the same crop in every loader, for any number of workers and
ranks, and after a resume. The functions are written once, for NumPy arrays and for numba's scalars alike.
"""

import math

import numpy as np

_A, _B, _C = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_D = np.uint64(0xD1342543DE82EF95)
_30, _27, _31, _11 = (np.uint64(c) for c in (30, 27, 31, 11))
_UNIT = 2.0**-53

# Random resized crop: share of the area and aspect ratio, as in the ImageNet recipes of the field.
SCALE = (0.08, 1.0)
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
ATTEMPTS = 10


def _mix(x):
    """The finalizer of splitmix64, a bijection of 64 bits (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> _30)) * _B
    x = (x ^ (x >> _27)) * _C
    return x ^ (x >> _31)


def uniform(seed, epoch, index, draw):
    """Number `draw` of a sample in an epoch, uniform in [0, 1). All arguments uint64, arrays or scalars."""
    x = _mix(seed * _A + epoch)
    x = _mix(x * _A + index)
    return (_mix(x * _D + draw) >> _11) * _UNIT


def crop_and_flip(seed: int, epoch: int, indices: np.ndarray, padding: int):
    """(top, left) in 0..2*padding of the crop from the padded image, and whether to flip; arrays like `indices`."""
    seed, epoch = np.array([seed], np.uint64), np.array([epoch], np.uint64)
    indices = indices.astype(np.uint64)
    top, left, flip = (uniform(seed, epoch, indices, np.array([draw], np.uint64)) for draw in range(3))
    offsets = 2 * padding + 1
    return (top * offsets).astype(np.int64), (left * offsets).astype(np.int64), flip < 0.5


def apply_crop_and_flip(images: np.ndarray, seed: int, epoch: int, indices: np.ndarray, padding: int,
                        flip: bool) -> np.ndarray:
    """Crop images [B, H, W, 3] from their zero-padded selves, and flip some. A new array."""
    top, left, mirrored = crop_and_flip(seed, epoch, indices, padding)
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    out = np.empty_like(images)
    for i in range(len(images)):
        crop = padded[i, top[i]:top[i] + height, left[i]:left[i] + width]
        out[i] = crop[:, ::-1] if flip and mirrored[i] else crop
    return out


def is_flipped(seed, epoch, index):
    """Whether a photograph is flipped: the same draw as in `crop_and_flip`. uint64 scalars."""
    return uniform(seed, epoch, index, np.uint64(2)) < 0.5


def resized_crop(seed, epoch, index, height, width):
    """(top, left, height, width) of a random resized crop. seed, epoch, index: uint64 scalars."""
    area = float(height) * float(width)
    draw = np.uint64(16)  # the first ones belong to crop_and_flip
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


def center_crop(height, width, ratio):
    """(top, left, side, side) of the central square of `ratio` times the shorter side."""
    side = int(ratio * min(height, width))
    return (height - side) // 2, (width - side) // 2, side, side
