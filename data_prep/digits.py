"""The digits: 1,797 real images of handwritten digits that scikit-learn contains, so nothing is downloaded.

They are written as RGB at 32x32 pixels, the size that CIFAR networks take: 8x8 pixels with grey levels 0..16, enlarged
bilinearly. scikit-learn defines no test set; a fifth of every class, drawn with a fixed seed, becomes one. Do not train
with flips: digits are not symmetric.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.writing import write_arrays
from nulsq.data.order import stratified
from nulsq.errors import require

SIZE = 32
TEST_SHARE, SEED = 0.2, 0


def prepare(out: Path) -> Path:
    """Write the data set to the folder `out`; returns it."""
    digits = require("sklearn.datasets", "digits").load_digits()
    images = np.stack([_enlarge(image) for image in digits.images])
    labels = digits.target.astype(np.int64)
    test = stratified(labels, TEST_SHARE, SEED)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return write_arrays(out, name="digits", classes=[str(digit) for digit in range(10)],
                        source="scikit-learn load_digits",
                        images={"train": images[train], "test": images[test]},
                        labels={"train": labels[train], "test": labels[test]})


def _enlarge(image: np.ndarray) -> np.ndarray:
    """float64 [8, 8] in 0..16 -> uint8 [32, 32, 3]"""
    grey = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
    return np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB"))
