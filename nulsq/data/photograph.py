"""Read a photograph from an image file of any common type as 8-bit RGB.

Pillow converts grey images, palettes, CMYK and images with transparency. 16-bit images are scaled to 8 bits (Pillow
would clip them to white). EXIF rotation is ignored, as is usual for ImageNet.
"""

from pathlib import Path
from typing import Any

import numpy as np

from nulsq.errors import InputError, require

MAX_PIXELS = 100_000_000  # the header of a small file can claim more, and decoding it would take all memory
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_rgb(path: Path) -> Any:
    """A decoded Pillow image of mode RGB. Raises InputError that names the file and the fault."""
    pil = require("PIL.Image", "train")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        with pil.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{path}: {width} x {height} pixels are more than {MAX_PIXELS:,}")
            if image.mode.startswith("I"):
                image = pil.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except InputError:
        raise
    except pil.UnidentifiedImageError:
        raise InputError(f"{path}: not an image") from None
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        raise InputError(f"{path}: {' '.join(str(error).split())[:160] or type(error).__name__}") from None


def problem(path: Path) -> str | None:
    """Why a file cannot be used as a photograph; None if it can."""
    if path.suffix.lower() not in SUFFIXES:
        return f"not named as an image ({', '.join(SUFFIXES)})"
    try:
        read_rgb(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return None
