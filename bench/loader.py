"""Images per second of each way to store photographs, relative to Pillow and a DataLoader on the original files.

    python -m bench.loader $NULSQ_DATA/photos_fullsize --json loader.json

SOURCE is a folder of photographs, flat or with class folders. It is prepared in each format, with copies until there
are --images photographs, then read with random resized crops to 224 pixels and flips, by as many workers as there are
cores. The formats take turns in every round, and ratios are those of a round. The first read after writing is timed
separately, with the files dropped from the page cache ("cold"). The last row is the share of a training step that waits
for its data, for preresnet18 at 2 bits with batches of 32.

`python -m data_prep bench DIR` measures the loaders of one data set by number of workers, also of small images.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Any, Literal

from bench.timing import add_options, begin, ratios, scratch, target_cells, write_json
from data_prep.__main__ import main as prepare
from nulsq.config import Data, load_recipe
from nulsq.data import DataSet, build_loaders
from nulsq.data.photograph import SUFFIXES
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.run.directory import path_of, read_metrics
from nulsq.text import markdown_table
from nulsq.train import train

FORMATS = {  # name: (options of data_prep, target ratio)
    "FFCV, JPEG at 400 px": (["--write-mode", "jpg", "--max-resolution", "400"], 3.0),
    "FFCV, 400 px, 10% JPEG (the recipes' own)": (["--write-mode", "proportion", "--max-resolution", "400"], 4.5),
    "FFCV, raw at 256 px": (["--write-mode", "raw", "--max-resolution", "256"], 8.0),
}
BASE = "Pillow, DataLoader, original files"


class Reader:
    """The training loader of one format; calling it reads an epoch."""

    def __init__(self, path: Path, loader_name: Literal["ffcv", "torchvision"], workers: int, size: int, batch: int):
        recipe = Data(path=str(path), batch=batch, loader=loader_name, workers=workers, crop="resized", flip=True,
                      size=size, holdout="none")
        self.loader, self.epoch = build_loaders(recipe, DataSet(path), 0).train, 0

    def __call__(self) -> float:
        """Images per second of the next epoch."""
        start, count = time.perf_counter(), 0
        for images, _, _ in self.loader.epoch(self.epoch):
            count += len(images)
        self.epoch += 1
        return count / (time.perf_counter() - start)


def link_photographs(source: Path, folder: Path, images: int) -> Path:
    """Two class folders with at least `images` links to the photographs, repeated as often as needed."""
    photographs = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not photographs:
        raise InputError(f"{source} has no photographs")
    for i in range(max(images, len(photographs))):
        path = photographs[i % len(photographs)]
        target = folder / "source" / ("even", "odd")[i % 2] / f"{i:05d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve())
    return folder / "source"


def drop_cache(folder: Path) -> None:
    """Ask the kernel to drop these files from its page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(source: Path, folder: Path, images: int, rounds: int, workers: int, size: int, batch: int
            ) -> list[dict[str, Any]]:
    """A row for each format, the original files last."""
    originals = link_photographs(source, folder, images)
    readers: dict[str, Reader] = {}
    cold, megabytes = {}, {}
    for name, (options, _) in FORMATS.items():
        out = folder / name
        if prepare(["folder", "--source", str(originals), "--out", str(out), *options]):
            raise InputError(f"{name}: the photographs could not be prepared, see above")
        readers[name] = Reader(out, "ffcv", workers, size, batch)
        megabytes[name] = (out / "train.beton").stat().st_size / 2**20
        readers[name]()  # compiles
        drop_cache(out)
        cold[name] = readers[name]()
    readers[BASE] = Reader(folder / next(iter(FORMATS)), "torchvision", workers, size, batch)
    megabytes[BASE] = sum(path.stat().st_size for path in originals.rglob("*") if path.is_file()) / 2**20
    drop_cache(originals)
    cold[BASE] = readers[BASE]()
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            rates[name].append(reader())
    rows = []
    for name in readers:
        middle, low, high = ratios(rates[name], rates[BASE])
        target = FORMATS[name][1] if name in FORMATS else None
        rows.append({"name": name, "images_per_second": round(statistics.median(rates[name]), 1),
                     "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "target": target,
                     "met": None if target is None else middle >= target, "cold": round(cold[name], 1),
                     "megabytes": round(megabytes[name], 1), "workers": workers, "rounds": rounds})
    return rows


def waiting(folder: Path, workers: int) -> dict[str, Any]:
    """The row of the share of a training step that waits for data in the recipes' format, preresnet18 at 2 bits.

    It is measured in the second epoch, because FFCV compiles in the first.
    """
    path = folder / list(FORMATS)[1]
    recipe = load_recipe("configs/recipes/imagenet/preresnet18_w2a2.yaml", {
        "name": "waiting", "run.root": str(folder), "data.path": str(path), "data.batch": 32, "data.loader": "ffcv",
        "data.workers": workers, "data.holdout": "none", "model.pretrained": False, "optim.epochs": 2,
        "optim.warmup_epochs": 0, "data.subset": 32 * 12, "quant.calibration_batches": 1, "run.precision": "fp32"})
    train(recipe, quiet=True)
    share = read_metrics(path_of(recipe))[-1]["wait_share"]
    return {"name": "waiting for data in a training step", "ratio": round(share, 4), "target": 0.02,
            "met": share <= 0.02}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    cells = [["loader", "images/s", "relative to Pillow", "quartiles", "target", "met", "cold images/s", "MB stored"]]
    for row in rows:
        if "cold" in row:
            low, high = row["quartiles"]
            cells.append([row["name"], f"{row['images_per_second']:.0f}", f"{row['ratio']:.2f}",
                          f"{low:.2f} - {high:.2f}", *target_cells(row), f"{row['cold']:.0f}",
                          f"{row['megabytes']:.0f}"])
        else:
            cells.append([row["name"], "", f"{row['ratio']:.4f}", "", *target_cells(row), "", ""])
    return "\n".join(markdown_table(cells))


def parser() -> Parser:
    parser = Parser(prog="python -m bench.loader", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of photographs")
    parser.add_argument("--images", type=int, default=640, help="minimum number of photographs (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images per batch (%(default)s)")
    parser.add_argument("--no-training", action="store_true", help="do not measure the wait in a training step")
    add_options(parser, rounds=5)
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if not arguments.source.is_dir():
        raise InputError(f"{arguments.source} is not a folder")
    begin(arguments)
    with scratch("bench-loader-") as folder:
        rows = measure(arguments.source, folder, arguments.images, arguments.rounds, arguments.workers, arguments.size,
                       arguments.batch)
        if not arguments.no_training:
            rows.append(waiting(folder, arguments.workers))
    print(table(rows))
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
