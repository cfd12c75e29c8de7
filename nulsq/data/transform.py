"""How samples of a split are looked at: crop, flip and size, the same words for every loader."""

from dataclasses import dataclass

STEP = 32  # pixels that photographs grow by: every network's stride divides it


@dataclass(frozen=True)
class View:
    seed: int
    crop: str  # "none" (photographs: central crop of `ratio`), "pad" (arrays), "resized" (photographs)
    padding: int
    flip: bool
    size: int  # pixels of photographs, from epoch ramp[1] on
    ratio: float  # of the central crop
    start_size: int | None = None  # their pixels until epoch ramp[0]; None: `size` throughout
    ramp: tuple[int, int] = (0, 0)

    @property
    def border(self) -> int:
        """Black pixels on every side that a random crop is taken out of."""
        return self.padding if self.crop == "pad" else 0

    def size_at(self, epoch: int) -> int:
        """Pixels of a photograph in an epoch: linear between the ends of the ramp, in steps of 32.

        The progressive resizing of FFCV's ImageNet recipes (Leclerc et al., CVPR 2023, arXiv:2306.12517).
        """
        first, last = self.ramp
        if self.start_size is None or epoch >= last:
            return self.size
        if epoch <= first:
            return self.start_size
        share = (epoch - first) / (last - first)
        return round((self.start_size + share * (self.size - self.start_size)) / STEP) * STEP
