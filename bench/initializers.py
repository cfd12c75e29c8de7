"""Quantization error of the initial step sizes: nmse, lsq, const and lloyd_max side by side, on real tensors.

    python -m bench.initializers --init WEIGHTS --data data/cifar10 --write docs/initializers.md

For each layer between the first and the last of a float network: the weight (per tensor and per output channel) and
the input on some training images. The number is sum (x - Q(x))^2 / sum x^2 in percent, its mean over the layers;
the first rows are a normal tensor (weights) and its positive half (activations), where NMSE's assumption is true.
"""

import platform
from pathlib import Path

import torch
from torch import Tensor

from bench import command
from nulsq.config import load_recipe
from nulsq.data import Normalize, build_loaders
from nulsq.distributed import Ranks
from nulsq.errors import Parser, exit_on_input_error
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.policy import quantizable
from nulsq.quant.registry import get_quantizer
from nulsq.quant.settings import INITIALIZERS
from nulsq.training.prepare import prepare
from nulsq.training.validate import first_batches

METHODS = ("lsq", "nulsq", "uniq", "apot", "lcq")
SAMPLES = 200_001
PAGE = """# Quantization error of the initial step sizes

Made by

```bash
{command}
```

sum (x - Q(x))^2 / sum x^2 in percent, mean over the layers between the first and the last; inputs on one batch of
training images. A normal tensor, where NMSE's assumption is true, first. `lloyd_max` gives every quantizer the best
common step for the data, and nuLSQ, whose steps are free, Lloyd's levels. `const` is meant for normalized weights,
which these are not.

{table}

CPU ({machine}), torch {torch}; no random numbers but the order of seed 0.
"""
FLOAT = ["quant.weight.quantizer=fp", "quant.activation.quantizer=fp", "quant.rules.edges.enabled=false"]


@torch.no_grad()
def error(x: Tensor, method: str, bits: int, init: str, role: str, per_channel: bool = False) -> float:
    """sum (x - Q(x))^2 / sum x^2 in percent, after `init`."""
    quantizer = get_quantizer(method)(bits, role, init=init, channels=x.shape[0] if per_channel else None)
    quantizer.reset_(Statistics.of(x, per_channel=per_channel, histogram=init == "lloyd_max"))
    return 100 * float((quantizer(x) - x).square().sum() / x.square().sum())


def tensors(arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and inputs of the network's middle layers."""
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
    return [model.get_submodule(name).weight.detach() for name in names], inputs


def table(kinds: dict[str, tuple[list[Tensor], str, bool]], bits: list[int]) -> str:
    rows = ["| tensors | quantizer | bits | " + " | ".join(INITIALIZERS) + " |", "|---" * (3 + len(INITIALIZERS)) + "|"]
    for kind, (values, role, per_channel) in kinds.items():
        for method in METHODS:
            for b in bits:
                found = [sum(error(x, method, b, init, role, per_channel) for x in values) / len(values)
                         for init in INITIALIZERS]
                rows.append(f"| {kind} | {method} | {b} | " + " | ".join(f"{each:.2f}" for each in found) + " |")
    return "\n".join(rows)


def parser() -> Parser:
    made = Parser(prog="python -m bench.initializers", description=__doc__)
    made.add_argument("--recipe", type=Path, default=Path("configs/recipes/cifar10/w2a2.yaml"), help="(%(default)s)")
    made.add_argument("--data", type=Path, default=Path("data/cifar10"), help="prepared data set (%(default)s)")
    made.add_argument("--init", required=True, help="float weights of the recipe's network")
    made.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="(2 3 4)")
    made.add_argument("--write", type=Path, help="write the page to this file")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    weights, inputs = tensors(arguments)
    normal = torch.special.ndtri((torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES).float()
    made = table({"normal": ([normal], "weight", False), "half normal": ([normal.relu()], "activation", False),
                  f"{len(weights)} weights": (weights, "weight", False),
                  f"{len(weights)} weights, per channel": (weights, "weight", True),
                  f"{len(inputs)} inputs": (inputs, "activation", False)}, arguments.bits)
    print(made)
    if arguments.write:
        arguments.write.write_text(PAGE.format(command=command("bench.initializers", argv), table=made,
                                               machine=platform.machine(), torch=torch.__version__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
