"""A table of methods x bits: top-1, mean and spread over seeds, the same budget and settings for all.

    python -m bench.compare_methods --init WEIGHTS --epochs 1 --subset 2560 --write docs/TABLE.md
    python -m bench.compare_methods --init WEIGHTS --epochs 300 --write docs/TABLE.md   # as published

Every cell is a run directory under --out, made by the one training function from one recipe; cells that are there are
not trained again, so an interrupted comparison continues and a longer list of seeds or methods extends it. Nothing is
selected: the last epoch of each run is what counts, on the test images or, with `--split val`, on the holdout, which
then nothing was chosen by and no run was trained on.
"""

import json
import platform
import statistics
from pathlib import Path

import torch

from bench import command
from nulsq._version import __version__
from nulsq.config import Recipe, load_recipe
from nulsq.distributed import join_ranks
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.evaluate import evaluate_run, read_evaluation
from nulsq.quant.registry import get_quantizer
from nulsq.run import checkpoint
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import read_outcome
from nulsq.train import train

# name in the table -> quantizer of weights, of activations
METHODS = {"minmax": ("minmax", "minmax"), "lsq": ("lsq", "lsq"), "nulsq-a": ("lsq", "nulsq"),
           "nulsq-wa": ("nulsq", "nulsq"), "lcq": ("lcq", "lcq"), "apot": ("apot", "apot"), "uniq": ("uniq", "uniq")}


SPLITS = {"test": "the test images", "val": "the holdout, training images that no run was trained on or chosen by"}


def cell(arguments, method: str, bits: int, seed: int) -> Recipe:
    """The recipe of one run."""
    weight, activation = METHODS[method]
    settings = {
        "name": f"{method}-w{bits}a{bits}-seed{seed}", "run.root": str(arguments.out), "run.seed": seed,
        "data.path": str(arguments.data), "quant.bits": bits, "quant.weight.quantizer": weight,
        "quant.activation.quantizer": activation, "optim.epochs": arguments.epochs,
        "optim.warmup_epochs": min(10.0, arguments.epochs / 10), "data.subset": arguments.subset,
        "run.threads": arguments.threads, "model.init_from": str(arguments.init) if arguments.init else None,
    }
    own = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
    return load_recipe(arguments.recipe, own + arguments.overrides)


def measured(recipe: Recipe, split: str, ranks) -> float:
    """Top-1 of the run's last epoch: trained and evaluated now where it is not there yet."""
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


def table(arguments, results: dict[str, dict[int, list[float]]]) -> str:
    rows = ["| method (weights / activations) | " + " | ".join(f"W{b}A{b}" for b in arguments.bits) + " | levels of a "
            f"W{arguments.bits[0]} weight |", "|---|" + "---|" * (len(arguments.bits) + 1)]
    for method, by_bits in results.items():
        weight, activation = METHODS[method]
        low, high = get_quantizer(weight)(arguments.bits[0], "weight").level_range
        cells = [f"{statistics.mean(found):.2f} +- {statistics.stdev(found) if len(found) > 1 else float('nan'):.2f}"
                 for found in by_bits.values()]
        rows.append(f"| {method} ({weight} / {activation}) | {' | '.join(cells)} | {high - low + 1} |")
    return "\n".join(rows)


def page(arguments, results, made_by: str) -> str:
    recipe = cell(arguments, arguments.methods[0], arguments.bits[0], arguments.seeds[0])
    images = f"{arguments.subset} training images" if arguments.subset else "all training images beside the holdout"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return (f"# Methods compared: {recipe.model.name}, {Path(arguments.data).name}\n\n"
            f"Made by\n\n```bash\n{made_by}\n```\n\n"
            f"Top-1 on {SPLITS[arguments.split]}, mean +- standard deviation over {len(arguments.seeds)} seeds "
            f"({', '.join(map(str, arguments.seeds))}) of order and augmentation, from the same starting weights. "
            f"{arguments.epochs} epoch(s) of {images}, batch {recipe.data.batch}, "
            f"lr {recipe.optim.lr}, coeff_qparm_lr {recipe.optim.coeff_qparm_lr}, weight_decay "
            f"{recipe.optim.weight_decay}, qparm_wd {recipe.optim.qparm_wd}, warm-up "
            f"{recipe.optim.warmup_epochs} epoch(s), then cosine; first and last layer 8-bit MinMax, no distillation; "
            f"batch norm re-estimated on {recipe.optim.reestimate_bn} batches. "
            f"The last epoch: nothing is selected, and no setting was tuned for a method. APoT and "
            f"LCQ normalize weights (lwn).\n\n{table(arguments, results)}\n\n"
            f"{hardware}, torch {torch.__version__}, nulsq {__version__}.\n")


def parser() -> Parser:
    made = Parser(prog="python -m bench.compare_methods", description=__doc__)
    made.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings for all cells")
    made.add_argument("--recipe", type=Path, default=Path("configs/recipes/cifar10/w2a2.yaml"), help="(%(default)s)")
    made.add_argument("--data", type=Path, default=Path("data/cifar10"), help="prepared data set (%(default)s)")
    made.add_argument("--init", type=Path, help="float weights that all cells start from; default: the recipe's")
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
                      help=", ".join(METHODS))
    made.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="(2 3 4)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    made.add_argument("--epochs", type=int, default=300, help="(%(default)s)")
    made.add_argument("--subset", type=int, help="train on this many images; default: all")
    made.add_argument("--split", choices=list(SPLITS), default="test", help="images that count (%(default)s)")
    made.add_argument("--threads", type=int, help="CPU threads")
    made.add_argument("--out", type=Path, default=Path("runs/compare"), help="run directories (%(default)s)")
    made.add_argument("--write", type=Path, help="write the page to this file")
    made.add_argument("--json", type=Path, help="write {method: {bits: [top-1 by seed]}} to this file")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    cells = {(method, bits, seed): cell(arguments, method, bits, seed)  # all of them are read before any is trained
             for method in arguments.methods for bits in arguments.bits for seed in arguments.seeds}
    if arguments.init and not arguments.init.exists():
        raise InputError(f"--init: no file or run directory {arguments.init}")
    results: dict[str, dict[int, list[float]]] = {}
    with join_ranks(next(iter(cells.values())).run.device) as ranks:
        for seed in arguments.seeds:  # seed by seed: what is there after an interruption is a table of fewer seeds
            for method in arguments.methods:
                for bits in arguments.bits:
                    top1 = measured(cells[method, bits, seed], arguments.split, ranks)
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
