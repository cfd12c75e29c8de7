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
    size: int  # side of a photograph's crop in pixels, from the end of the ramp
    ratio: float  # side of the central square / shorter side of the photograph
    start_size: int | None = None  # side until the start of the ramp; None: `size` in every epoch
    ramp: tuple[float, float] = (0.0, 0.0)  # its start and end, as shares of the training
    epochs: int = 1  # of the whole training

    @property
    def border(self) -> int:
        """Black pixels added on each side before a random crop."""
        return self.padding if self.crop == "pad" else 0

    def size_at(self, epoch: int) -> int:
        """Side of a photograph's crop in an epoch: linear within the ramp, rounded to multiples of 32 pixels.

        An epoch's place on the ramp is the share of the training that is done when the epoch ends. A ramp from 0.75 to
        0.875 gives the progressive resizing of FFCV's ImageNet recipes at each of their lengths, 16 to 88 epochs
        (Leclerc et al., CVPR 2023, arXiv:2306.12517).
        """
        start, end = self.ramp
        done = (epoch + 1) / self.epochs
        if self.start_size is None or done >= end:
            return self.size
        if done <= start:
            return self.start_size
        grown = (done - start) / (end - start)
        return round((self.start_size + grown * (self.size - self.start_size)) / STEP) * STEP
