"""Images per second of every way to store photographs, beside Pillow and a DataLoader on the original files.

    python -m bench.loader $NULSQ_DATA/photos_fullsize --json loader.json

SOURCE is a folder of photographs (one flat folder, or class folders). It is prepared in each format, with copies until
there are --images of them, then read with random resized crops to 224 pixels and flips, our own repeatable ones, by as
many workers as there are cores. Formats take turns, round by round; a ratio is that of a round. The first read after
writing is timed apart, the files dropped from the page cache ("cold"). The last row: the share of a training step that
waits for its data, preresnet18 at 2 bits, batch 32. By cores, and for small images: `python -m data_prep bench DIR`.
"""

import os
import statistics
import time
from pathlib import Path

from bench.timing import add_options, begin, ratios, scratch, write_json
from data_prep.__main__ import main as prepare
from nulsq.config import Data, load_recipe
from nulsq.data import DataSet, build_loaders
from nulsq.data.photograph import SUFFIXES
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.run.directory import path_of, read_metrics
from nulsq.train import train

STORED = {  # name: options of data_prep, target ratio
    "FFCV, JPEG at 400 px": (["--write-mode", "jpg", "--max-resolution", "400"], 3.0),
    "FFCV, 400 px, 10% JPEG (the recipes' own)": (["--write-mode", "proportion", "--max-resolution", "400"], 4.5),
    "FFCV, raw at 256 px": (["--write-mode", "raw", "--max-resolution", "256"], 8.0),
}
BASE = "Pillow, DataLoader, original files"


class Reader:
    """One format's training loader; calling it reads an epoch."""

    def __init__(self, path: Path, kind: str, workers: int, size: int, batch: int):
        recipe = Data(path=str(path), batch=batch, loader=kind, workers=workers, crop="resized", flip=True, size=size,
                      holdout="none")
        self.loader, self.number = build_loaders(recipe, DataSet(path), 0).train, 0

    def __call__(self) -> float:
        """Images per second of the next epoch."""
        began, count = time.perf_counter(), 0
        for images, _, _ in self.loader.epoch(self.number):
            count += len(images)
        self.number += 1
        return count / (time.perf_counter() - began)


def sources(source: Path, folder: Path, images: int) -> Path:
    """Class folders with links to the photographs, over and over until there are so many."""
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{source} has no photographs")
    for i in range(max(images, len(found))):
        path = found[i % len(found)]
        target = folder / "source" / ("even", "odd")[i % 2] / f"{i:05d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve())
    return folder / "source"


def drop_cache(folder: Path) -> None:
    """Forget what of these files is in memory, as far as the kernel lets one."""
    for path in (each for each in folder.rglob("*") if each.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(source: Path, folder: Path, images: int, rounds: int, workers: int, size: int, batch: int) -> list[dict]:
    where = sources(source, folder, images)
    readers, cold, megabytes = {}, {}, {}
    for name, (options, _) in STORED.items():
        out = folder / name
        if prepare(["folder", "--source", str(where), "--out", str(out), *options]):
            raise InputError(f"{name}: the photographs could not be prepared, see above")
        readers[name] = Reader(out, "ffcv", workers, size, batch)
        megabytes[name] = (out / "train.beton").stat().st_size / 2**20
        readers[name]()  # compiles
        drop_cache(out)
        cold[name] = readers[name]()
    readers[BASE] = Reader(folder / next(iter(STORED)), "torchvision", workers, size, batch)
    megabytes[BASE] = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) / 2**20
    drop_cache(where)
    cold[BASE] = readers[BASE]()
    rates = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            rates[name].append(reader())
    rows = []
    for name in readers:
        middle, low, high = ratios(rates[name], rates[BASE])
        target = STORED[name][1] if name in STORED else None
        rows.append({"name": name, "images_per_second": round(statistics.median(rates[name]), 1),
                     "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)], "target": target,
                     "met": None if target is None else middle >= target, "cold": round(cold[name], 1),
                     "megabytes": round(megabytes[name], 1), "workers": workers, "rounds": rounds})
    return rows


def waiting(folder: Path, workers: int) -> dict:
    """The share of a training step that waits for data: the recipe's format, preresnet18 at 2 bits, batch 32.

    Of the second epoch: FFCV compiles in the first.
    """
    path = folder / list(STORED)[1]
    recipe = load_recipe("configs/recipes/imagenet/preresnet18_w2a2.yaml", {
        "name": "waiting", "run.root": str(folder), "data.path": str(path), "data.batch": 32, "data.loader": "ffcv",
        "data.workers": workers, "data.holdout": "none", "model.pretrained": False, "optim.epochs": 2,
        "optim.warmup_epochs": 0, "data.subset": 32 * 12, "quant.calibration_batches": 1, "run.precision": "fp32"})
    train(recipe, quiet=True)
    share = read_metrics(path_of(recipe))[-1]["wait_share"]
    return {"name": "waiting for data in a training step", "ratio": round(share, 4), "target": 0.02,
            "met": share <= 0.02}


def table(rows: list[dict]) -> str:
    lines = ["| loader | images/s | against Pillow | quartiles | target | met | cold images/s | MB stored |",
             "|---" * 8 + "|"]
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:g}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        if "cold" not in row:
            lines.append(f"| {row['name']} |  | {row['ratio']:.4f} |  | {target} | {met} |  |  |")
            continue
        lines.append(f"| {row['name']} | {row['images_per_second']:.0f} | {row['ratio']:.2f} | "
                     f"{row['quartiles'][0]:.2f} - {row['quartiles'][1]:.2f} | {target} | {met} | {row['cold']:.0f} | "
                     f"{row['megabytes']:.0f} |")
    return "\n".join(lines)


def parser() -> Parser:
    made = Parser(prog="python -m bench.loader", description=__doc__)
    made.add_argument("source", type=Path, help="folder of photographs")
    made.add_argument("--images", type=int, default=640, help="copies until there are so many (%(default)s)")
    made.add_argument("--workers", type=int, default=os.cpu_count(), help="(%(default)s)")
    made.add_argument("--size", type=int, default=224, help="pixels (%(default)s)")
    made.add_argument("--batch", type=int, default=32, help="(%(default)s)")
    made.add_argument("--no-training", action="store_true", help="leave out the wait in a training step")
    add_options(made, rounds=5)
    return made


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
