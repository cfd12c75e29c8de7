"""Reading photographs as they lie on disk: whatever kind of image a file holds, 8-bit RGB comes out, or a reason.

Grey images, palettes, CMYK and images with transparency are converted as Pillow does; 16-bit images are scaled to 8
bits (Pillow clips them to white). EXIF rotation is ignored, as everywhere in ImageNet's practice.
"""

from pathlib import Path

import numpy as np

from nulsq.errors import InputError, require

MOST_PIXELS = 100_000_000  # a small file can claim to be larger, and take all memory
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_rgb(path: Path):
    """A Pillow image in mode RGB, decoded. Raises InputError that names the file and what is wrong with it."""
    pil = require("PIL.Image", "train")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        with pil.open(path) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise InputError(f"{path}: {width} x {height} pixels are more than {MOST_PIXELS:,}")
            if image.mode.startswith("I"):
                image = pil.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except InputError:
        raise
    except pil.UnidentifiedImageError:
        raise InputError(f"{path}: not an image") from None
    except Exception as error:  # damaged files make Pillow raise whatever it comes upon
        raise InputError(f"{path}: {' '.join(str(error).split())[:160] or type(error).__name__}") from None


def problem(path: Path) -> str | None:
    """Why a file cannot be used as a photograph; None where it can."""
    if path.suffix.lower() not in SUFFIXES:
        return f"not named as an image ({', '.join(SUFFIXES)})"
    try:
        read_rgb(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return None
