"""How samples of a split are looked at: crop, flip and size, the same words for every loader."""

from dataclasses import dataclass

STEP = 32  # pixels that photographs grow by: every network's stride divides it


@dataclass(frozen=True)
class View:
    seed: int
    crop: str  # "none" (photographs: central crop of `ratio`), "pad" (arrays), "resized" (photographs)
    padding: int
    flip: bool
    size: int  # pixels of photographs, at the end of the ramp where there is one
    ratio: float  # of the central crop
    start_size: int | None = None  # pixels before the ramp; None: `size` throughout
    ramp: tuple[float, float] = (0.0, 0.0)  # where it starts and ends, as shares of the training
    epochs: int = 1  # of the whole training

    @property
    def border(self) -> int:
        """Black pixels on every side that a random crop is taken out of."""
        return self.padding if self.crop == "pad" else 0

    def size_at(self, epoch: int) -> int:
        """Pixels of a photograph in an epoch: linear between the ends of the ramp, in steps of 32.

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
