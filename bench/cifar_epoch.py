"""Seconds per epoch and holdout accuracy of PreResNet-20 on CIFAR-10: float, and W2A2 nuLSQ-A in different forms.

    python -m bench.cifar_epoch --init $NULSQ_DATA/weights/preresnet20_cifar10_float.pth --seeds 0 1 2

Every run calls `nulsq.train` for --epochs epochs from the given float weights, with the recipe's schedule. Accuracy is
that of the holdout; the test images are not opened. Seconds are the training part of an epoch, and the mean over all
epochs but the first if there are several, because the first one compiles. On a GPU, or with --compile, the network is
compiled. On a GPU there are also rows for steps that are replayed as CUDA graphs (run.cuda_graph).
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from bench.step import FLOAT
from bench.timing import machine
from nulsq.config import load_recipe
from nulsq.errors import Parser, exit_on_input_error
from nulsq.quant.op import FORMS, force
from nulsq.run.directory import read_metrics
from nulsq.text import markdown_table
from nulsq.train import train

HEADER = ["network", "seconds per epoch", "by seed", "holdout top-1", "by seed"]


def epoch(arguments: argparse.Namespace, root: str, name: str, overrides: list[str], seed: int,
          form: str | None) -> tuple[float, float]:
    """Train one run. Returns the seconds of an epoch's training, and top-1 on the holdout after the last epoch."""
    recipe = load_recipe("configs/recipes/cifar10/w2a2.yaml", [
        f"data.path={arguments.data}", f'model.init_from="{arguments.init}"', f"run.root={root}", f"run.seed={seed}",
        f"run.train_id={name}-{seed}", f"optim.epochs={arguments.epochs}", "optim.warmup_epochs=0.1",
        f"optim.lr={arguments.lr}", f"run.compile={str(arguments.compile).lower()}", *overrides])
    with force(form):
        state = train(recipe, quiet=True)
    assert state.status == "finished", state.status
    lines = read_metrics(Path(root) / f"{recipe.name}-{name}-{seed}")
    images = lines[0]["step"] * recipe.data.batch
    seconds = [images / line["images_per_second"] for line in lines]
    return statistics.mean(seconds[1:] or seconds), lines[-1]["val_top1"]


def parser() -> Parser:
    parser = Parser(prog="python -m bench.cifar_epoch", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="prepared data set (%(default)s)")
    parser.add_argument("--init", required=True, help="float weights of pytorchcv:preresnet20_cifar10")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each run (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.04, help="learning rate (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (0)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["fused"],
                        help="implementations of the quantizers to compare (fused)")
    parser.add_argument("--compile", action="store_true", default=torch.cuda.is_available(),
                        help="compile the network (always on a GPU)")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    print(machine())
    print(*markdown_table([HEADER]), sep="\n")
    with tempfile.TemporaryDirectory() as root:
        networks: list[tuple[str, list[str], str | None]] = [("float", FLOAT, None)]
        networks += [(f"W2A2 {form}", [], form) for form in arguments.forms]
        if torch.cuda.is_available():
            networks += [(f"{name} graphs", [*overrides, "run.cuda_graph=true"], form)
                         for name, overrides, form in networks if form != "eager"]  # eager synchronizes with the host
        for name, overrides, form in networks:
            results = [epoch(arguments, root, name.replace(" ", "-"), overrides, seed, form)
                       for seed in arguments.seeds]
            seconds, accuracy = zip(*results, strict=True)
            spread = f" ± {statistics.stdev(accuracy):.2f}" if len(results) > 1 else ""
            cells = [name, f"{statistics.mean(seconds):.1f}", ", ".join(f"{value:.1f}" for value in seconds),
                     f"{statistics.mean(accuracy):.2f}{spread}", ", ".join(f"{value:.2f}" for value in accuracy)]
            print(markdown_table([HEADER, cells])[-1], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
