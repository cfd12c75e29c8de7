"""Prepare a data set, check one, or time its loaders.

    python -m data_prep digits --out data/digits
    python -m data_prep imagenet --source /data/imagenet --out data/imagenet
    python -m data_prep check data/imagenet
    python -m data_prep bench data/imagenet

A prepared data set is a folder that recipes name as data.path. It appears under its name when it is complete.

Exit codes: 0 success; 2 bad input, nothing written, or a damaged data set; 6 prepared without some files, which
DIR/skipped.txt names.
"""

import importlib.util
import os
from pathlib import Path

from data_prep import bench, check, cifar, digits, folder
from data_prep.writing import Beton, existing
from nulsq.data.manifest import DataSet
from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error

DATA_SETS = {
    "digits": "scikit-learn's handwritten digits at 32x32 pixels; nothing is downloaded",
    "cifar10": "CIFAR-10, from the standard Python batches or downloaded",
    "cifar100": "CIFAR-100, from the standard Python batches or downloaded",
    "folder": "photographs: SOURCE/train/CLASS/* and SOURCE/val/CLASS/*, or SOURCE/CLASS/*, of which a fifth, drawn "
              "with a fixed seed, becomes the test set",
    "imagenet": "ImageNet: SOURCE/train/CLASS/*.JPEG and SOURCE/val/CLASS/*.JPEG",
}


def parser() -> Parser:
    parser = Parser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in DATA_SETS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the prepared data set")
        if name.startswith("cifar"):
            command.add_argument("--source", type=Path, metavar="DIR",
                                 help="folder of the standard Python batches; default: download them next to --out")
        if name in ("folder", "imagenet"):
            _add_photograph_options(command)
    command = commands.add_parser(
        "check", help="compare a data set, or one .beton file, with what was written",
        description="Compare a data set, or one of its .beton files, with its manifest: sizes, checksums, counts and "
                    "labels. Then decode every sample of the .beton files.")
    command.add_argument("path", type=Path, help="folder of a prepared data set, or a .beton file")
    command.add_argument("--no-decode", action="store_true", help="do not decode the samples")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode (%(default)s)")
    command = commands.add_parser(
        "bench", help="measure the images per second of each loader",
        description="Images per second of each loader that can read the data set, by number of workers, with random "
                    "crops and flips.")
    command.add_argument("path", type=Path, help="folder of a prepared data set")
    command.add_argument("--workers", type=int, nargs="+", default=list(range(1, (os.cpu_count() or 1) + 1)),
                         help="numbers of workers to measure (1 to the number of cores)")
    command.add_argument("--size", type=int, default=224, help="side of a photograph's crop in pixels (%(default)s)")
    command.add_argument("--batch", type=int, default=64, help="images per batch (%(default)s)")
    command.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement (%(default)s)")
    return parser


def _add_photograph_options(command: Parser) -> None:
    defaults = Beton()
    command.add_argument("--source", type=Path, required=True, metavar="DIR", help="folder of the photographs")
    command.add_argument("--write-mode", choices=["raw", "jpg", "smart", "proportion"], default=defaults.write_mode,
                         help="how the .beton files store photographs: raw and smart as pixels, which decode fastest; "
                              "jpg, which takes the least space; proportion as a mixture (%(default)s)")
    command.add_argument("--max-resolution", type=int, default=defaults.max_resolution, metavar="PIXELS",
                         help="shrink photographs whose longer side exceeds this (%(default)s)")
    command.add_argument("--compress-probability", type=float, default=defaults.compress_probability, metavar="SHARE",
                         help="share that --write-mode proportion stores as JPEG (%(default)s)")
    command.add_argument("--jpeg-quality", type=int, default=defaults.jpeg_quality, metavar="1-100",
                         help="quality of JPEGs in the .beton files (%(default)s)")
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    command.add_argument("--on-error", choices=["fail", "skip"], default="fail",
                         help="if some files cannot be used, write nothing, or leave them out; each is printed with "
                              "the reason (%(default)s)")
    command.add_argument("--max-skipped", type=float, default=0.01, metavar="SHARE",
                         help="fail in spite of --on-error skip if more than this share of the files cannot be used "
                              "(%(default)s)")


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.command == "check":
        print(check.check(arguments.path, decode=not arguments.no_decode, workers=arguments.workers))
        return ExitCode.FINISHED
    if arguments.command == "bench":
        print(bench.bench(arguments.path, arguments.workers, arguments.size, arguments.batch, arguments.seconds))
        return ExitCode.FINISHED
    name, out = arguments.command, arguments.out
    if existing(out, name):
        print(f"{check.check(out)} (was there already)")
        if importlib.util.find_spec("ffcv") is not None and DataSet(out).beton("train") is None:
            print(f"it was written without ffcv: to get train.beton, remove {out} and run this command again")
        return ExitCode.FINISHED
    skipped = 0
    if name == "digits":
        digits.prepare(out)
    elif name.startswith("cifar"):
        cifar.prepare(out, name, arguments.source)
    else:
        if not 0 <= arguments.max_skipped <= 1:
            raise InputError(f"--max-skipped {arguments.max_skipped:g}, allowed: 0 to 1")
        beton = Beton(arguments.write_mode, arguments.max_resolution, arguments.compress_probability,
                      arguments.jpeg_quality)
        _, skipped = folder.prepare(out, arguments.source, name=name, beton=beton, workers=arguments.workers,
                                    on_error=arguments.on_error, max_skipped=arguments.max_skipped)
    print(check.check(out))
    if skipped:
        print(f"{skipped} files were left out: {out / 'skipped.txt'}")
        return ExitCode.FILES_SKIPPED
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
