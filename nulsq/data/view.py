"""How samples of a split are looked at: crop, flip and size, the same words for every loader."""

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    seed: int
    crop: str  # "none" (photographs: central crop of `ratio`), "pad" (arrays), "resized" (photographs)
    padding: int
    flip: bool
    size: int  # pixels of photographs
    ratio: float  # of the central crop
