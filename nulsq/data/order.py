"""Which images a step takes, in which order, on which rank: pure functions of (seed, epoch).

Batches are global. Step t of epoch e takes slice t of permutation(seed, e), and rank r takes its part of that slice. So
a step takes the same images on any number of ranks, and an epoch can be entered at any step.
"""

from collections.abc import Callable

import numpy as np

from nulsq.config.holdout import ALLOWED, parse_holdout
from nulsq.errors import InputError

CHUNK = 128  # neighbouring images of a file: some megabytes of photographs
Order = Callable[[int], list[np.ndarray]]  # epoch -> this rank's sample indices, one array per step


def split(labels: np.ndarray, holdout: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the training images into sorted indices (train, val).

    `holdout` is data.holdout (see `nulsq.config.holdout`); `seed` draws a stratified one. Raises InputError if it
    cannot be read or leaves nothing to train on.
    """
    count, wanted = len(labels), parse_holdout(holdout)
    if wanted.form == "none":
        val = np.array([], dtype=np.int64)
    elif wanted.form == "last":
        if wanted.count >= count:
            raise InputError(f"data.holdout = {holdout!r}, but there are {count} training images. Allowed: {ALLOWED}")
        val = np.arange(count - wanted.count, count)
    else:
        val = stratified(labels, wanted.share, seed)
    return np.setdiff1d(np.arange(count), val), val


def stratified(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Sorted indices of a random `share` of every class, rounded and at least one image."""
    generator = np.random.default_rng([seed, 0])
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen.append(generator.permutation(members)[:max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def subset(indices: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """A sorted random choice of `count` indices; all of them for None. Raises InputError if there are fewer."""
    if count is None:
        return indices
    if count > len(indices):
        raise InputError(f"data.subset = {count}, there are only {len(indices)} training images")
    return np.sort(np.random.default_rng([seed, 1]).permutation(indices)[:count])


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]"""
    return np.random.default_rng([seed, epoch]).permutation(count)


def windowed(seed: int, epoch: int, count: int, window: int) -> np.ndarray:
    """A permutation for data larger than memory: int64 [count].

    The file is cut into chunks of CHUNK neighbours, which are put into random order. Then the images of `window` //
    CHUNK consecutive chunks at a time are shuffled. So images are read in runs of CHUNK, and only one window has to
    stay in memory, the same one on every rank. (FFCV's quasi-random order works in one process only.)
    """
    generator = np.random.default_rng([seed, epoch, 2])
    chunks = [np.arange(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    mixed = [chunks[i] for i in generator.permutation(len(chunks))]
    chunks_per_window = max(1, window // CHUNK)
    return np.concatenate([generator.permutation(np.concatenate(mixed[start:start + chunks_per_window]))
                           for start in range(0, len(mixed), chunks_per_window)])


def shuffled(indices: np.ndarray, batch: int, seed: int, rank: int = 0, size: int = 1,
             window: int | None = None) -> Order:
    """Training order: full global batches of `batch` images, of which each of `size` ranks takes an equal part.

    window: images to shuffle at a time (see `windowed`); None shuffles all of them. Raises InputError if the batch is
    larger than the data or does not divide.
    """
    if batch % size:
        raise InputError(f"data.batch = {batch} does not divide over {size} ranks")
    if batch > len(indices):
        raise InputError(f"data.batch = {batch} is more than the {len(indices)} training images")
    part = batch // size

    def order(epoch: int) -> list[np.ndarray]:
        count = len(indices)
        mixed = indices[permutation(seed, epoch, count) if window is None else windowed(seed, epoch, count, window)]
        steps = len(indices) // batch
        return [mixed[step * batch + rank * part:step * batch + (rank + 1) * part] for step in range(steps)]
    return order


def sharded(indices: np.ndarray, batch: int, rank: int = 0, size: int = 1) -> Order:
    """Evaluation order: each index once on one of the ranks, without padding; the last batch may be smaller."""
    own = indices[rank::size]
    part = max(1, batch // size)
    return lambda epoch: [own[start:start + part] for start in range(0, len(own), part)]
