"""The embedded data set: scikit-learn's handwritten digits, 1,797 real images that come inside the package.

Written at 32x32 RGB, the size that CIFAR networks take: 8x8 images of 0..16 grey levels, enlarged bilinearly. A fifth
of every class, drawn with a fixed seed, is the test set (the package names none). Do not flip: digits are not
symmetric.
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
    grey = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
    return np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB"))
