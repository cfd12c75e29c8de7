"""Photographs in class folders: SOURCE/train/CLASS/*.jpg, with SOURCE/val (or test) or without, or SOURCE/CLASS/*.jpg.

`imagenet` is the same with the usual layout and the published mean and standard deviation. Without a val or test
folder a seeded stratified fifth becomes the test set.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.writing import Beton, write_files
from nulsq.data.order import stratified
from nulsq.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TEST_SHARE, SEED = 0.2, 0
MEASURED = 1000  # images that mean and standard deviation are measured on


def prepare(out: Path, source: Path, *, name: str, beton: Beton, workers: int) -> Path:
    if not source.is_dir():
        raise InputError(f"--source {source} is not a folder")
    imagenet = name == "imagenet"
    held = next((source / each for each in ("val", "test") if (source / each).is_dir()), None)
    if (source / "train").is_dir() and held is not None:
        train, test = _scan(source / "train"), _scan(held)
        classes = sorted(train)
        if set(test) != set(train):
            odd = sorted(set(test) ^ set(train))
            raise InputError(f"{source / 'train'} and {held} do not have the same class folders; "
                             f"only in one: {', '.join(odd[:5])}")
    elif imagenet:
        raise InputError(f"{source} is not ImageNet's usual layout: train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    else:
        train, test = _scan(source / "train" if (source / "train").is_dir() else source), {}
        classes = sorted(train)
    paths, labels = {}, {}
    for split, found in (("train", train), ("test", test)):
        paths[split] = [str(path.relative_to(source)) for label in classes for path in found.get(label, [])]
        labels[split] = np.array([i for i, label in enumerate(classes) for _ in found.get(label, [])], dtype=np.int64)
    if not test:
        chosen = stratified(labels["train"], TEST_SHARE, SEED)
        rest = np.setdiff1d(np.arange(len(labels["train"])), chosen)
        everything, all_labels = paths["train"], labels["train"]
        paths = {"train": [everything[i] for i in rest], "test": [everything[i] for i in chosen]}
        labels = {"train": all_labels[rest], "test": all_labels[chosen]}
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else _moments(source, paths["train"])
    return write_files(out, name=name, classes=classes, source=str(source), root=source, paths=paths, labels=labels,
                       mean=mean, std=std, beton=beton, workers=workers)


def _scan(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its images, sorted."""
    found = {entry.name: sorted(path for path in entry.rglob("*") if path.suffix.lower() in SUFFIXES)
             for entry in sorted(folder.iterdir()) if entry.is_dir()}
    empty = [name for name, images in found.items() if not images]
    if not found or empty:
        raise InputError(f"{folder} has " + (f"class folders without images: {', '.join(empty[:5])}" if empty
                                             else "no class folders"))
    return found


def _moments(source, paths):
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for path in np.random.default_rng(SEED).permutation(paths)[:MEASURED]:
        try:
            with Image.open(source / path) as image:
                pixels = np.asarray(image.convert("RGB")).reshape(-1, 3) / 255
        except Exception:  # the writer lists every damaged file
            continue
        sums, squares, count = sums + pixels.sum(0), squares + np.square(pixels).sum(0), count + len(pixels)
    if not count:
        raise InputError(f"no image of {source} can be read")
    mean = sums / count
    return [round(m, 5) for m in mean.tolist()], [round(s, 5) for s in np.sqrt(squares / count - mean**2).tolist()]
