"""Photographs in class folders: SOURCE/train/CLASS/*.jpg, with SOURCE/val (or test) or without, or SOURCE/CLASS/*.jpg.

`imagenet` is the same with the usual layout and the published mean and standard deviation. Without a val or test
folder a seeded stratified fifth becomes the test set.
"""

from pathlib import Path

import numpy as np

from data_prep.examine import examine, report_problems
from data_prep.writing import Beton, write_files
from nulsq.data.order import stratified
from nulsq.data.photograph import read_rgb
from nulsq.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TEST_SHARE, SEED = 0.2, 0
MEASURED = 1000  # images that mean and standard deviation are measured on


def prepare(out: Path, source: Path, *, name: str, beton: Beton, workers: int, on_error: str = "fail",
            most: float = 0.01) -> tuple[Path, int]:
    """Returns the data set's folder and how many files were left out of it; skipped.txt in it names them.

    Files that cannot be used are printed with the reason; `on_error` "fail" then writes nothing, "skip" goes on
    without them up to a share `most` of all files. Raises InputError.
    """
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
    every = [path.relative_to(source) for found in (train, test) for images in found.values() for path in images]
    problems = examine(source, [str(path) for path in every], workers)
    report_problems(problems, len(every), on_error, most)
    left_out = {source / path for path in problems}
    for found in (train, test):
        for label in found:
            found[label] = [path for path in found[label] if path not in left_out]
            if not found[label]:
                raise InputError(f"class {label} has no image left that can be used; nothing was written")
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
    write_files(out, name=name, classes=classes, source=str(source), root=source, paths=paths, labels=labels,
                mean=mean, std=std, beton=beton, workers=workers, skipped=problems)
    return out, len(problems)


def _scan(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its images, sorted."""
    found = {entry.name: sorted(path for path in entry.rglob("*") if path.is_file() and path.name[0] != ".")
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
            pixels = np.asarray(read_rgb(source / path)).reshape(-1, 3) / 255
        except InputError:  # changed since it was examined; the writer will say so
            continue
        sums, squares, count = sums + pixels.sum(0), squares + np.square(pixels).sum(0), count + len(pixels)
    if not count:
        raise InputError(f"no image of {source} can be read")
    mean = sums / count
    return [round(m, 5) for m in mean.tolist()], [round(s, 5) for s in np.sqrt(squares / count - mean**2).tolist()]
