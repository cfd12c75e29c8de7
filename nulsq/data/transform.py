"""Crop, flip and size of a split's images: one description that every loader follows."""

from dataclasses import dataclass

STEP = 32  # photographs grow by this many pixels, a multiple of every network's stride


@dataclass(frozen=True)
class Transform:
    """How a loader turns stored images into those of a batch."""

    seed: int
    crop: str  # "none" (of a photograph the central square), "pad" (small images), "resized" (photographs)
    padding: int  # pixels on each side, for crop "pad"
    flip: bool  # mirror half of the images
    size: int  # side of a photograph's crop in pixels, from epoch ramp[1]
    ratio: float  # side of the central square / shorter side of the photograph
    start_size: int | None = None  # side until epoch ramp[0]; None: `size` in every epoch
    ramp: tuple[int, int] = (0, 0)

    @property
    def border(self) -> int:
        """Black pixels added on each side before a random crop."""
        return self.padding if self.crop == "pad" else 0

    def size_at(self, epoch: int) -> int:
        """Side of a photograph's crop in an epoch: linear within the ramp, rounded to multiples of 32 pixels.

        This is the progressive resizing of FFCV's ImageNet recipes (Leclerc et al., CVPR 2023, arXiv:2306.12517).
        """
        first, last = self.ramp
        if self.start_size is None or epoch >= last:
            return self.size
        if epoch <= first:
            return self.start_size
        share = (epoch - first) / (last - first)
        return round((self.start_size + share * (self.size - self.start_size)) / STEP) * STEP
