"""Photographs in class folders: SOURCE/train/CLASS/*.jpg and SOURCE/val (or test), SOURCE/train alone, or SOURCE/CLASS.

Without a val or test folder, a fifth of every class, drawn with a fixed seed, becomes the test set. `imagenet` requires
train and val, and takes the published mean and standard deviation instead of measuring them.
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
MEASURED_IMAGES = 1000  # images that mean and standard deviation are measured on

ClassFolders = dict[str, list[Path]]  # class name -> its files, sorted


def prepare(out: Path, source: Path, *, name: str, beton: Beton, workers: int, on_error: str = "fail",
            max_skipped: float = 0.01) -> tuple[Path, int]:
    """Write the data set `name` ("folder" or "imagenet"); returns its folder and the number of files left out.

    Every photograph is decoded first. If some cannot be used, they are printed with the reason, and with `on_error`
    "fail" nothing is written. With "skip" they are left out, up to a share `max_skipped` of all files; skipped.txt in
    the data set names them. Raises InputError.
    """
    if not source.is_dir():
        raise InputError(f"--source {source} is not a folder")
    train, test = _find_images(source, imagenet=name == "imagenet")
    classes = sorted(train)
    all_paths = [path.relative_to(source) for split in (train, test) for paths in split.values() for path in paths]
    problems = examine(source, [str(path) for path in all_paths], workers)
    report_problems(problems, len(all_paths), on_error, max_skipped)
    left_out = {source / path for path in problems}
    for split in (train, test):
        for label in split:
            split[label] = [path for path in split[label] if path not in left_out]
            if not split[label]:
                raise InputError(f"class {label} has no image left that can be used; nothing was written")
    paths, labels = {}, {}
    for split_name, split in (("train", train), ("test", test)):
        paths[split_name] = [str(path.relative_to(source)) for label in classes for path in split.get(label, [])]
        labels[split_name] = np.array([i for i, label in enumerate(classes) for _ in split.get(label, [])],
                                      dtype=np.int64)
    if not test:
        chosen = stratified(labels["train"], TEST_SHARE, SEED)
        rest = np.setdiff1d(np.arange(len(labels["train"])), chosen)
        train_paths, train_labels = paths["train"], labels["train"]
        paths = {"train": [train_paths[i] for i in rest], "test": [train_paths[i] for i in chosen]}
        labels = {"train": train_labels[rest], "test": train_labels[chosen]}
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if name == "imagenet" else _moments(source, paths["train"])
    write_files(out, name=name, classes=classes, source=str(source), root=source, paths=paths, labels=labels,
                mean=mean, std=std, beton=beton, workers=workers, skipped=problems)
    return out, len(problems)


def _find_images(source: Path, imagenet: bool) -> tuple[ClassFolders, ClassFolders]:
    """Files of the training and the test split; the latter is empty if `source` has none."""
    test = next((source / name for name in ("val", "test") if (source / name).is_dir()), None)
    if (source / "train").is_dir() and test is not None:
        train_images, test_images = _class_folders(source / "train"), _class_folders(test)
        if set(test_images) != set(train_images):
            unmatched = sorted(set(test_images) ^ set(train_images))
            raise InputError(f"{source / 'train'} and {test} do not have the same class folders; "
                             f"only in one: {', '.join(unmatched[:5])}")
        return train_images, test_images
    if imagenet:
        raise InputError(f"{source} is not ImageNet's usual layout: train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    return _class_folders(source / "train" if (source / "train").is_dir() else source), {}


def _class_folders(folder: Path) -> ClassFolders:
    images = {entry.name: sorted(path for path in entry.rglob("*") if path.is_file() and path.name[0] != ".")
              for entry in sorted(folder.iterdir()) if entry.is_dir()}
    empty = [name for name, paths in images.items() if not paths]
    if not images or empty:
        raise InputError(f"{folder} has " + (f"class folders without images: {', '.join(empty[:5])}" if empty
                                             else "no class folders"))
    return images


def _moments(source: Path, paths: list[str]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of values in 0..1, over some training images."""
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for path in np.random.default_rng(SEED).permutation(paths)[:MEASURED_IMAGES]:
        try:
            pixels = np.asarray(read_rgb(source / path)).reshape(-1, 3) / 255
        except InputError:  # it changed after `examine`; the writer will report it
            continue
        sums, squares, count = sums + pixels.sum(0), squares + np.square(pixels).sum(0), count + len(pixels)
    if not count:
        raise InputError(f"no image of {source} can be read")
    mean = sums / count
    return [round(m, 5) for m in mean.tolist()], [round(s, 5) for s in np.sqrt(squares / count - mean**2).tolist()]
