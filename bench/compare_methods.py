"""Compare methods at several bit-widths: top-1, mean and spread over seeds, with equal budget and settings.

    python -m bench.compare_methods --init WEIGHTS --epochs 1 --subset 2560 --write docs/TABLE.md
    python -m bench.compare_methods --init WEIGHTS --epochs 300 --write docs/TABLE.md   # the published schedule

Every cell of the table is a run directory under --out, trained by `nulsq.train` from the same recipe. Finished runs are
not trained again, so the same command continues an interrupted comparison, and a longer list of seeds or methods
extends it. Nothing is selected: the last epoch of each run counts. `nulsq.evaluate` computes its accuracy on the test
images; with `--split val` it is the accuracy on the holdout that training recorded.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from bench import command
from nulsq._version import __version__
from nulsq.config import Recipe, load_recipe
from nulsq.distributed import Ranks, join_ranks
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.evaluate import evaluate_run, read_evaluation
from nulsq.quant.registry import get_quantizer
from nulsq.run import checkpoint
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import read_outcome
from nulsq.text import markdown_table
from nulsq.train import train

# name in the table -> (quantizer of weights, of activations)
METHODS = {"minmax": ("minmax", "minmax"), "lsq": ("lsq", "lsq"), "nulsq-a": ("lsq", "nulsq"),
           "nulsq-wa": ("nulsq", "nulsq"), "lcq": ("lcq", "lcq"), "apot": ("apot", "apot"), "uniq": ("uniq", "uniq")}
SPLITS = {"test": "the test images", "val": "the holdout, training images that no run was trained on or selected by"}

Results = dict[str, dict[int, list[float]]]  # method -> bits -> top-1 of each seed


def cell(arguments: argparse.Namespace, method: str, bits: int, seed: int) -> Recipe:
    """The recipe of one run."""
    weight, activation = METHODS[method]
    settings: dict[str, Any] = {
        "name": f"{method}-w{bits}a{bits}-seed{seed}", "run.root": str(arguments.out), "run.seed": seed,
        "data.path": str(arguments.data), "quant.bits": bits, "quant.weight.quantizer": weight,
        "quant.activation.quantizer": activation, "optim.epochs": arguments.epochs,
        "optim.warmup_epochs": min(10.0, arguments.epochs / 10), "data.subset": arguments.subset,
        "run.threads": arguments.threads, "model.init_from": str(arguments.init) if arguments.init else None,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
    return load_recipe(arguments.recipe, overrides + arguments.overrides)


def top1_of(recipe: Recipe, split: str, ranks: Ranks) -> float:
    """Top-1 of the run's last epoch in percent; nan if the run diverges. Trains and evaluates what is not there yet."""
    run = path_of(recipe)
    if not (run.exists() and read_outcome(run)["outcome"] == "finished"):
        state = train(recipe, quiet=True)
        if state.status != "finished":
            return float("nan")
    if split == "val":
        return read_metrics(run)[-1]["val_top1"]
    found = read_evaluation(run)
    if found is None or found["step"] != checkpoint.load_chosen(run, "last")["step"]:
        found = evaluate_run(run, which="last", ranks=ranks)
    return found["test_top1"]


def table(arguments: argparse.Namespace, results: Results) -> str:
    rows = [["method (weights / activations)", *(f"W{bits}A{bits}" for bits in arguments.bits),
             f"levels of a W{arguments.bits[0]} weight"]]
    for method, by_bits in results.items():
        weight, activation = METHODS[method]
        low, high = get_quantizer(weight)(arguments.bits[0], "weight").level_range
        cells = [f"{statistics.mean(top1):.2f} +- {statistics.stdev(top1) if len(top1) > 1 else float('nan'):.2f}"
                 for top1 in by_bits.values()]
        rows.append([f"{method} ({weight} / {activation})", *cells, str(high - low + 1)])
    return "\n".join(markdown_table(rows))


def page(arguments: argparse.Namespace, results: Results, command_line: str) -> str:
    """The table with what a reader needs to repeat it, as Markdown."""
    recipe = cell(arguments, arguments.methods[0], arguments.bits[0], arguments.seeds[0])
    images = f"{arguments.subset} training images" if arguments.subset else "all training images but the holdout"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return (f"# Methods compared: {recipe.model.name}, {Path(arguments.data).name}\n\n"
            f"Made by\n\n```bash\n{command_line}\n```\n\n"
            f"Top-1 on {SPLITS[arguments.split]}, mean +- standard deviation over {len(arguments.seeds)} seeds "
            f"({', '.join(map(str, arguments.seeds))}) of order and augmentation, from the same starting weights. "
            f"{arguments.epochs} epoch(s) of {images}, batch {recipe.data.batch}, "
            f"lr {recipe.optim.lr}, coeff_qparm_lr {recipe.optim.coeff_qparm_lr}, weight_decay "
            f"{recipe.optim.weight_decay}, qparm_wd {recipe.optim.qparm_wd}, warm-up "
            f"{recipe.optim.warmup_epochs} epoch(s), then cosine; first and last layer 8-bit MinMax, no distillation; "
            f"batch norm re-estimated on {recipe.optim.reestimate_bn} batches. "
            f"Top-1 is that of the last epoch: nothing was selected, and no setting was tuned for a method. APoT and "
            f"LCQ normalize weights (lwn).\n\n{table(arguments, results)}\n\n"
            f"{hardware}, torch {torch.__version__}, nulsq {__version__}.\n")


def parser() -> Parser:
    parser = Parser(prog="python -m bench.compare_methods", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe, for all runs")
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/cifar10/w2a2.yaml"),
                        help="recipe of all runs (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="prepared data set (%(default)s)")
    parser.add_argument("--init", type=Path, help="float weights that all runs start from; default: the recipe's")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
                        help=", ".join(METHODS) + " (all)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="bit-widths (2 3 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each cell for each (0 1 2)")
    parser.add_argument("--epochs", type=int, default=300, help="epochs of each run (%(default)s)")
    parser.add_argument("--subset", type=int, help="train on this many images; default: all")
    parser.add_argument("--split", choices=list(SPLITS), default="test", help="images to evaluate on (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (all cores)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"),
                        help="folder of the run directories (%(default)s)")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    parser.add_argument("--json", type=Path, help="write {method: {bits: [top-1 by seed]}} to this file")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    cells = {(method, bits, seed): cell(arguments, method, bits, seed)  # errors come before the first run is trained
             for method in arguments.methods for bits in arguments.bits for seed in arguments.seeds}
    if arguments.init and not arguments.init.exists():
        raise InputError(f"--init: no file or run directory {arguments.init}")
    results: Results = {}
    with join_ranks(next(iter(cells.values())).run.device) as ranks:
        for seed in arguments.seeds:  # an interrupted comparison has fewer seeds, but all methods
            for method in arguments.methods:
                for bits in arguments.bits:
                    top1 = top1_of(cells[method, bits, seed], arguments.split, ranks)
                    results.setdefault(method, {}).setdefault(bits, []).append(top1)
                    print(f"{method:9} W{bits}A{bits} seed {seed}: {arguments.split} top-1 {top1:.2f}", flush=True)
    print(table(arguments, results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.write:
        arguments.write.write_text(page(arguments, results, command("bench.compare_methods", argv)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
