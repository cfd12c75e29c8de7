"""Epochs of CIFAR-10 with PreResNet-20: W2A2 nuLSQ-A beside float, and beside the plain forms; seconds and accuracy.

    python -m bench.cifar_epoch --init $NULSQ_DATA/weights/preresnet20_cifar10_float.pth --seeds 0 1 2

Every run is `nulsq.train` with the recipe's own schedule for so many epochs, from the given float weights; accuracy is
the holdout's, never the test set's. Seconds are the training part of an epoch, the mean after the first one where there
are several: the first compiles. On a GPU, or with --compile, the network is compiled; on a GPU there are rows of steps
replayed as CUDA graphs (run.cuda_graph), too.
"""

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
from nulsq.train import train


def epoch(arguments, root: str, name: str, overrides: list[str], seed: int, form: str | None) -> tuple[float, float]:
    """Seconds of an epoch's training and top-1 on the holdout after the last one."""
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
    made = Parser(prog="python -m bench.cifar_epoch", description=__doc__)
    made.add_argument("--data", type=Path, default=Path("data/cifar10"), help="prepared data set (%(default)s)")
    made.add_argument("--init", required=True, help="float weights of pytorchcv:preresnet20_cifar10")
    made.add_argument("--epochs", type=int, default=1, help="(%(default)s)")
    made.add_argument("--lr", type=float, default=0.04, help="(%(default)s)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="(0)")
    made.add_argument("--forms", nargs="+", choices=FORMS, default=["fused"], help="of the quantizers (fused)")
    made.add_argument("--compile", action="store_true", default=torch.cuda.is_available(), help="(on a GPU)")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    print(machine())
    print("| network | seconds an epoch | by seed | holdout top-1 | by seed |", "|---" * 5 + "|", sep="\n")
    with tempfile.TemporaryDirectory() as root:
        sides = [("float", FLOAT, None)] + [(f"W2A2 {form}", [], form) for form in arguments.forms]
        if torch.cuda.is_available():
            sides += [(f"{name} graphs", [*overrides, "run.cuda_graph=true"], form) for name, overrides, form in sides
                      if form != "eager"]  # which reads numbers of the device
        for name, overrides, form in sides:
            found = [epoch(arguments, root, name.replace(" ", "-"), overrides, seed, form) for seed in arguments.seeds]
            seconds, accuracy = zip(*found, strict=True)
            spread = f" ± {statistics.stdev(accuracy):.2f}" if len(found) > 1 else ""
            each_second, each_accuracy = (", ".join(f"{each:.{digits}f}" for each in values)
                                          for values, digits in ((seconds, 1), (accuracy, 2)))
            print(f"| {name} | {statistics.mean(seconds):.1f} | {each_second} | "
                  f"{statistics.mean(accuracy):.2f}{spread} | {each_accuracy} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
