"""What a run or a search costs in hours and nodes, from a throughput that was measured. Prints the arithmetic.

    python -m bench.price --epochs 88 --images 1268355 --images-per-second 10032 --slower 1.05 --places 8 --per-node 8
    python -m bench.price --epochs 15627 --run runs/cifar10-w2a2-0 --places 64 --per-node 16     # measured by this run

A place is what trains one run: a GPU, eight of them, two cores. Epochs of a search: what its --dry-run says. Places are
taken as equally fast and always busy (docs/search.md has what a search costs beside its trials).
"""

import statistics
from pathlib import Path

from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.run.directory import read_metrics


def parser() -> Parser:
    made = Parser(prog="python -m bench.price", description=__doc__)
    made.add_argument("--epochs", type=float, required=True, help="of the run, or of all trials together")
    made.add_argument("--run", metavar="DIR", help="a run whose metrics say images and images/s of one place")
    made.add_argument("--images", type=int, help="of an epoch")
    made.add_argument("--images-per-second", type=float, metavar="N", help="of one place")
    made.add_argument("--slower", type=float, default=1.0, metavar="RATIO", help="quantized / float, of a step")
    made.add_argument("--places", type=int, default=1, help="that train at the same time")
    made.add_argument("--per-node", type=int, default=1, help="places of a node")
    return made


def measured(run: str) -> tuple[int, float]:
    """Images of an epoch, and the median images/s of the epochs after the first one, which fills caches."""
    lines = read_metrics(Path(run))
    if not lines:
        raise InputError(f"{run} has no metrics.jsonl, or no epoch in it")
    return lines[-1]["train_images"], statistics.median(line["images_per_second"] for line in lines[1:] or lines)


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    images, rate = measured(arguments.run) if arguments.run else (arguments.images, arguments.images_per_second)
    if not images or not rate:
        raise InputError("either --run DIR, or --images and --images-per-second")
    for name in ("epochs", "slower", "places", "per_node"):
        if not getattr(arguments, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name):g}, allowed: above 0")
    rate /= arguments.slower
    hours = arguments.epochs * images / (rate * arguments.places) / 3600
    nodes = -(-arguments.places // arguments.per_node)
    print(f"{rate:,.0f} images/s of a place"
          + (f" (float {rate * arguments.slower:,.0f} / {arguments.slower:g})" if arguments.slower != 1 else ""))
    print(f"{arguments.epochs:,.0f} epochs x {images:,} images / ({rate:,.0f} images/s x {arguments.places} places) = "
          f"{hours:,.1f} hours")
    print(f"{hours:,.1f} hours x {nodes} nodes of {arguments.per_node} places = {hours * nodes:,.1f} node hours")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
