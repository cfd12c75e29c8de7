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

    @property
    def border(self) -> int:
        """Black pixels on every side that a random crop is taken out of."""
        return self.padding if self.crop == "pad" else 0
