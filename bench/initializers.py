"""Quantization error of the initial step sizes: mse, nmse, lsq and const on the tensors of a real network.

    python -m bench.initializers --init WEIGHTS --data data/cifar10 --pretrained FOLDER --write docs/initializers.md

For every layer of a float network but the first and the last: its weight (per tensor and per output channel) and its
input on a batch of training images. The error is sum (x - Q(x))^2 / sum x^2 in percent, averaged over the layers. The
first rows are a normal tensor (as weights) and its positive half (as activations), for which NMSE's assumption holds.
With --pretrained, a second table has the accuracy of a trained ImageNet network that is only calibrated.
"""

import argparse
import platform
from pathlib import Path

import torch
from torch import Tensor

from bench import command
from bench.initial_accuracy import accuracy_rows
from nulsq.config import load_recipe
from nulsq.data import Normalize, build_loaders
from nulsq.distributed import Ranks
from nulsq.errors import Parser, exit_on_input_error
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.policy import quantizable
from nulsq.quant.registry import get_quantizer
from nulsq.quant.settings import INITIALIZERS
from nulsq.text import markdown_table
from nulsq.training.prepare import prepare
from nulsq.training.validate import first_batches

METHODS = ("lsq", "nulsq", "uniq", "apot", "lcq")
SAMPLES = 200_001
PAGE = """# Quantization error of the initial step sizes

Made by

```bash
{command}
```

sum (x - Q(x))^2 / sum x^2 in percent, mean over all layers but the first and the last; inputs of one batch of training
images. The first rows are a normal tensor, for which NMSE's assumption holds. `mse` gives every quantizer the best
common step for the data, and nuLSQ, whose steps are free, Lloyd's levels. `const` is meant for normalized weights,
which these are not.

{table}
{accuracy}
CPU ({machine}), torch {torch}; the only random numbers are the order of the images, with seed 0.
"""
ACCURACY = """
## Accuracy after calibration alone

torchvision's squeezenet1_1 with trained weights, top-1 on 240 photographs (one is 0.4 points), calibrated on the first
100 of them, nothing trained. The photographs were chosen to be easy: do not compare with validation accuracies.

{table}
"""
FLOAT = ["quant.weight.quantizer=fp", "quant.activation.quantizer=fp", "quant.rules.edges.enabled=false"]


@torch.no_grad()
def error(x: Tensor, method: str, bits: int, init: str, role: str, per_channel: bool = False) -> float:
    """sum (x - Q(x))^2 / sum x^2 in percent, of a quantizer whose step sizes the initializer `init` has set."""
    quantizer = get_quantizer(method)(bits, role, init=init, channels=x.shape[0] if per_channel else None)
    quantizer.reset_(Statistics.of(x, per_channel=per_channel))
    return 100 * float((quantizer(x) - x).square().sum() / x.square().sum())


def tensors(arguments: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and inputs of all layers of the network but the first and the last."""
    settings = [*FLOAT, f"data.path={arguments.data}", f'model.init_from="{arguments.init}"']
    recipe = load_recipe(arguments.recipe, settings)
    prepared = prepare(recipe, Ranks(0, 1, torch.device("cpu")))
    data, model = prepared.data, prepared.model
    names, inputs = quantizable(model)[1:-1], []
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
               for name in names]
    loader = build_loaders(recipe.data, data, recipe.run.seed, epochs=recipe.optim.epochs).train
    with torch.no_grad():
        for x in first_batches(loader, Normalize(data, torch.device("cpu")), 1):
            model.eval()(x)
    for handle in handles:
        handle.remove()
    return [model.get_parameter(f"{name}.weight").detach() for name in names], inputs


def table(tensors: dict[str, tuple[list[Tensor], str, bool]], bits: list[int]) -> str:
    """tensors: description -> (tensors, role, one step per channel)."""
    rows = [["tensors", "quantizer", "bits", *INITIALIZERS]]
    for description, (values, role, per_channel) in tensors.items():
        for method in METHODS:
            for b in bits:
                errors = [sum(error(x, method, b, init, role, per_channel) for x in values) / len(values)
                          for init in INITIALIZERS]
                rows.append([description, method, str(b), *(f"{value:.2f}" for value in errors)])
    return "\n".join(markdown_table(rows))


def parser() -> Parser:
    parser = Parser(prog="python -m bench.initializers", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/cifar10/w2a2.yaml"),
                        help="recipe that names the network (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="prepared data set (%(default)s)")
    parser.add_argument("--init", required=True, help="float weights of the recipe's network")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="bit-widths (2 3 4)")
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER",
                        help="a trained network with images, see bench/initial_accuracy.py")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page to this file")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    rows = accuracy_rows(arguments.pretrained) if arguments.pretrained else []
    weights, inputs = tensors(arguments)
    normal = torch.special.ndtri((torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES).float()
    text = table({"normal": ([normal], "weight", False), "half normal": ([normal.relu()], "activation", False),
                  f"{len(weights)} weights": (weights, "weight", False),
                  f"{len(weights)} weights, per channel": (weights, "weight", True),
                  f"{len(inputs)} inputs": (inputs, "activation", False)}, arguments.bits)
    accuracy = ACCURACY.format(table="\n".join(markdown_table(rows))) if rows else ""
    print(text, accuracy, sep="\n")
    if arguments.write:
        arguments.write.write_text(PAGE.format(command=command("bench.initializers", argv), table=text,
                                               accuracy=accuracy, machine=platform.machine(), torch=torch.__version__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
