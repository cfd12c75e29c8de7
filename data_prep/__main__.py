"""python -m data_prep digits|cifar10|cifar100|folder|imagenet|check|bench: prepare a data set, check or time one.

Exit codes: 0 all is well, 2 nothing was written or something is damaged, 6 prepared without some files, which
DIR/skipped.txt names.
"""

import importlib.util
import os
from pathlib import Path

from data_prep import bench, check, cifar, digits, folder
from data_prep.writing import Beton, existing
from nulsq.data.manifest import DataSet
from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error

HELP = {
    "digits": "scikit-learn's handwritten digits, at 32x32 RGB; needs no --source",
    "cifar10": "the standard python batches; without --source, downloaded",
    "cifar100": "the standard python batches; without --source, downloaded",
    "folder": "SOURCE/train/CLASS/* and SOURCE/val/CLASS/*, or SOURCE/CLASS/* (a seeded fifth is the test set)",
    "imagenet": "SOURCE/train/CLASS/*.JPEG and SOURCE/val/CLASS/*.JPEG",
}


def parser() -> Parser:
    made = Parser(prog="python -m data_prep", description=__doc__)
    verbs = made.add_subparsers(dest="verb", required=True)
    for name, text in HELP.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--out", type=Path, required=True, help="folder of the prepared data set")
        if name != "digits":
            verb.add_argument("--source", type=Path, required=name in ("folder", "imagenet"),
                              help="where the images are")
        if name in ("folder", "imagenet"):
            defaults = Beton()
            verb.add_argument("--write-mode", choices=["raw", "jpg", "smart", "proportion"],
                              default=defaults.write_mode, help="how .beton stores pixels (%(default)s)")
            verb.add_argument("--max-resolution", type=int, default=defaults.max_resolution,
                              help="longer side in pixels (%(default)s)")
            verb.add_argument("--compress-probability", type=float, default=defaults.compress_probability,
                              help="share stored as JPEG with proportion (%(default)s)")
            verb.add_argument("--jpeg-quality", type=int, default=defaults.jpeg_quality, help="(%(default)s)")
            verb.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
            verb.add_argument("--on-error", choices=["fail", "skip"], default="fail",
                              help="files that cannot be used: write nothing, or leave them out; each is printed with "
                                   "the reason (%(default)s)")
            verb.add_argument("--max-skipped", type=float, default=0.01, metavar="SHARE",
                              help="with --on-error skip, fail all the same above this share (%(default)s)")
    checking = verbs.add_parser("check", help="is a data set, or a .beton file, as it was written?",
                                description="Sizes, checksums, counts, labels; and decodes every sample.")
    checking.add_argument("path", type=Path)
    checking.add_argument("--no-decode", action="store_true", help="leave the pixels out")
    checking.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    timing = verbs.add_parser("bench", help="images per second that each loader gives",
                              description="Images per second of a prepared data set, by loader and workers, with "
                                          "random crops and flips.")
    timing.add_argument("path", type=Path)
    timing.add_argument("--workers", type=int, nargs="+", default=list(range(1, (os.cpu_count() or 1) + 1)),
                        help="(1 to the number of cores)")
    timing.add_argument("--size", type=int, default=224, help="pixels of photographs (%(default)s)")
    timing.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    timing.add_argument("--seconds", type=float, default=5.0, help="of each row (%(default)s)")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.verb == "check":
        print(check.check(arguments.path, decode=not arguments.no_decode, workers=arguments.workers))
        return 0
    if arguments.verb == "bench":
        print(bench.bench(arguments.path, arguments.workers, arguments.size, arguments.batch, arguments.seconds))
        return 0
    if existing(arguments.out, arguments.verb):
        print(f"{check.check(arguments.out)} (was there already)")
        if importlib.util.find_spec("ffcv") is not None and DataSet(arguments.out).beton("train") is None:
            print(f"it was written without ffcv: for train.beton remove {arguments.out} and run this again")
        return 0
    skipped = 0
    if arguments.verb == "digits":
        digits.prepare(arguments.out)
    elif arguments.verb.startswith("cifar"):
        cifar.prepare(arguments.out, arguments.verb, arguments.source)
    else:
        beton = Beton(arguments.write_mode, arguments.max_resolution, arguments.compress_probability,
                      arguments.jpeg_quality)
        if not 0 <= arguments.max_skipped <= 1:
            raise InputError(f"--max-skipped {arguments.max_skipped:g}, allowed: 0 to 1")
        _, skipped = folder.prepare(arguments.out, arguments.source, name=arguments.verb, beton=beton,
                                    workers=arguments.workers, on_error=arguments.on_error, most=arguments.max_skipped)
    print(check.check(arguments.out))
    if skipped:
        print(f"{skipped} files were left out: {arguments.out / 'skipped.txt'}")
    return ExitCode.FILES_SKIPPED if skipped else ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
