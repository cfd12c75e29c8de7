"""Read and verify the records of a `.beton` file (FFCV's format, version 2). Needs no ffcv.

    header, field descriptions, one record per sample, ..., pixels, ..., a table of the places of each sample's pixels

FFCV's compiled code copies pixels by these numbers without checking them, so a damaged width would write past the end
of a buffer. They are checked here before FFCV opens the file.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nulsq.errors import InputError

VERSION = 2
JPEG, RAW = 0, 1
IMAGE, INTEGER = 2, 1  # type ids of our two fields
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")])
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "S1024")])
SAMPLE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8"), ("padding", "V3"),
                   ("label", "<i8")])
PLACE = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])


@dataclass(frozen=True)
class BetonFile:
    path: Path
    digest: str  # sha256 of everything but the pixels
    samples: np.ndarray  # SAMPLE [N]
    sizes: np.ndarray  # int64 [N], bytes of each sample's pixels

    def bytes_of(self, index: int) -> bytes:
        """The stored pixels of a sample: a JPEG, or height x width x 3 raw bytes."""
        with self.path.open("rb") as file:
            file.seek(int(self.samples["start"][index]))
            return file.read(int(self.sizes[index]))


def read(path: Path, labels: np.ndarray | None = None, digest: str | None = None) -> BetonFile:
    """The records of a `.beton` file, verified to be consistent with each other and with the file's size.

    labels (int64 [N]), digest: what the file has to contain, if given. Raises InputError naming the file and the fault.
    """
    def fault(what: str) -> InputError:
        return InputError(f"{path} {what}; make the data set again with python -m data_prep")

    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            if length < HEADER.itemsize:
                raise fault(f"has only {length} bytes: truncated")
            parts = [file.read(HEADER.itemsize)]
            header = np.frombuffer(parts[0], HEADER)[0]
            if header["version"] != VERSION:
                raise fault(f"is no .beton file of version {VERSION} (it says {header['version']})")
            if header["fields"] != 2:
                raise fault(f"has {header['fields']} fields, an image and a label are expected")
            count, table = int(header["samples"]), int(header["table"])
            records = HEADER.itemsize + 2 * FIELD.itemsize
            if records + count * SAMPLE.itemsize > length or not records <= table <= length:
                raise fault(f"is truncated: {length} bytes do not hold its {count} samples and their table")
            parts += [file.read(2 * FIELD.itemsize), file.read(count * SAMPLE.itemsize)]
            fields, samples = np.frombuffer(parts[1], FIELD), np.frombuffer(parts[2], SAMPLE)
            if fields["type"].tolist() != [IMAGE, INTEGER]:
                raise fault("does not hold an image and a label for each sample")
            file.seek(table)
            parts.append(file.read())
            places = np.frombuffer(parts[3][:len(parts[3]) // PLACE.itemsize * PLACE.itemsize], PLACE)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if labels is not None and (len(samples) != len(labels) or not np.array_equal(samples["label"], labels)):
        raise fault(f"has other labels than the data set ({len(samples)} samples for {len(labels)})")
    sizes, actual_digest = _sizes(samples, places, length, fault), hashlib.sha256(b"".join(parts)).hexdigest()
    if digest is not None and digest != actual_digest:
        raise fault("is damaged: its records are not those that were written")
    return BetonFile(path, actual_digest, samples, sizes)


def _sizes(samples: np.ndarray, places: np.ndarray, length: int, fault: Callable[[str], InputError]) -> np.ndarray:
    """Bytes of each sample's pixels, int64 [N], after checking every number that FFCV's code relies on."""
    if len(places) != len(samples) or not len(samples):
        raise fault(f"has a table of {len(places)} places for {len(samples)} samples")
    places = places[np.argsort(places["start"], kind="stable")]
    at = np.searchsorted(places["start"], samples["start"])
    known = (at < len(places)) & (places["start"][np.minimum(at, len(places) - 1)] == samples["start"])
    sizes = places["size"][np.minimum(at, len(places) - 1)]
    inside = (samples["start"] <= length) & (sizes <= length) & (samples["start"] + sizes <= length)
    raw = samples["mode"] == RAW
    area = samples["width"].astype(np.uint64) * samples["height"] * np.uint64(3)
    good = known & inside & (area > 0) & np.where(raw, sizes == area, (samples["mode"] == JPEG) & (sizes > 0))
    if not good.all():
        index = int(np.flatnonzero(~good)[0])
        raise fault(f"is damaged: the record of sample {index} is impossible (mode {samples['mode'][index]}, "
                    f"{samples['width'][index]} x {samples['height'][index]} pixels, {sizes[index]} bytes at "
                    f"{samples['start'][index]} of {length})")
    return sizes.astype(np.int64)
