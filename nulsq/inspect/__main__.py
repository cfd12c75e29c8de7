"""Inspection of a network: what its quantizers do to the values of each layer, and what it costs.

    python -m nulsq.inspect runs/digits-w2a2-0                              # a run, as evaluation sees its checkpoint
    python -m nulsq.inspect configs/recipes/digits/w2a2.yaml quant.bits=3   # a recipe before training, calibrated
    python -m nulsq.inspect runs/digits-w2a2-0 --no-plot --json - | jq .totals

Printed: a line for the weight and one for the input of each layer,

    levels                used / available
    step size             distance between neighbouring levels, smallest .. largest
    clipped               share of values beyond the end levels
    SNR                   signal to quantization noise, 10 log10(sum x^2 / sum (x - Q(x))^2); about 6 dB a bit
    entropy               of the level numbers: how many of the bits carry something
    oscillating, frozen   shares of the weights, where the run tracks them

and the totals for one image: average bits, bytes with packed weights, multiply-accumulates, bit operations. Written
into --out: overview.png with histograms, levels, thresholds and staircases, and further pages for what it leaves out.
Inputs are measured in float32 on images of the holdout, of training where nothing is held out; never of test.
"""

import json
from pathlib import Path

from torch import nn

from nulsq.config import Recipe, load_recipe
from nulsq.data import DataSet, Normalize, build_loaders
from nulsq.distributed import Ranks, join_ranks
from nulsq.errors import InputError, Parser, did_you_mean, exit_on_input_error, require
from nulsq.files import write_atomically
from nulsq.inspect.measure import report
from nulsq.inspect.pictures import plot
from nulsq.inspect.table import content, text
from nulsq.models.trained import trained_network
from nulsq.quant.calibration.calibrate import calibrate_
from nulsq.quant.projection import quantizers_of
from nulsq.run import checkpoint
from nulsq.run.directory import read_recipe
from nulsq.training.prepare import prepare
from nulsq.training.validate import first_batches


def of_run(run: Path, which: str, ranks: Ranks) -> tuple[Recipe, DataSet, nn.Module, str]:
    """A run's recipe, data set and trained network, and what it is in words. `which`: auto, best or last."""
    recipe = read_recipe(run)
    content = checkpoint.load_chosen(run, which)
    data = DataSet(recipe.data.path)
    model = trained_network(recipe, content, len(data.classes)).to(ranks.device)
    return recipe, data, model, f"{run}, after epoch {content['epoch']}"


def of_recipe(path: Path, overrides: list[str], ranks: Ranks) -> tuple[Recipe, DataSet, nn.Module, str]:
    """A recipe's data set and its network at the start of training, calibrated, and what it is in words."""
    recipe = load_recipe(path, overrides)
    prepared = prepare(recipe, ranks)
    data, model = prepared.data, prepared.model
    model.to(ranks.device)
    if quantizers_of(model):
        train = build_loaders(recipe.data, data, recipe.run.seed, device=ranks.device, epochs=recipe.optim.epochs).train
        batches = first_batches(train, Normalize(data, ranks.device), recipe.quant.calibration_batches)
        try:
            calibrate_(model, batches, recipe.quant.calibration)
        except ValueError as error:
            raise InputError(str(error)) from None
    return recipe, data, model, f"{recipe.name}, before training"


def _kind(path: Path, overrides: list[str]) -> str:
    """"run" or "recipe". Raises InputError, with what is near, for a path that is neither."""
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            inside = sorted(str(each.parent) for each in path.glob("*/recipe.yaml"))
            raise InputError(f"{path} is not a run directory (no recipe.yaml)"
                             + (f"; in it there are: {', '.join(inside[:6])}" if inside else ""))
        if overrides:
            raise InputError(f"{overrides[0]}: a run is shown as it was trained; settings belong to a recipe")
        return "run"
    if path.suffix in (".yaml", ".yml"):
        return "recipe"
    if path.exists():
        raise InputError(f"{path} is neither a run directory nor a recipe (.yaml)")
    runs = [str(each.parent) for each in path.parent.glob("*/recipe.yaml")]
    raise InputError(f"no run directory or recipe {path}.{did_you_mean(path, runs, count=3, cutoff=0.5)}")


def parser() -> Parser:
    made = Parser(prog="python -m nulsq.inspect", description=__doc__)
    made.add_argument("what", type=Path, metavar="RUN|RECIPE", help="run directory, or recipe (.yaml)")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings of a recipe")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (RUN/inspect; for a recipe "
                      "ROOT/NAME-inspect, beside where its run will be)")
    made.add_argument("--batches", type=int, default=2, metavar="N",
                      help="batches of images that inputs are measured on (%(default)s)")
    made.add_argument("--json", metavar="FILE", help="write everything measured, all levels and steps too, into FILE; "
                      "- prints it instead of the table")
    made.add_argument("--no-plot", action="store_true", help="no pictures (and no need of matplotlib)")
    made.add_argument("--checkpoint", choices=["auto", "best", "last"], default="auto",
                      help="of a run; auto: best where there is one")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    if arguments.batches < 1:
        raise InputError(f"--batches {arguments.batches}, allowed: at least 1")
    kind = _kind(arguments.what, arguments.overrides)
    if kind == "recipe" and arguments.checkpoint != "auto":
        raise InputError(f"--checkpoint {arguments.checkpoint}: only a run has checkpoints, not a recipe")
    if not arguments.no_plot:
        require("matplotlib", "train")  # looked for before minutes are spent
    with join_ranks(arguments.device) as ranks:
        if ranks.size > 1:
            raise InputError(f"inspection runs in one process, not on {ranks.size} ranks")
        if kind == "run":
            recipe, data, model, title = of_run(arguments.what, arguments.checkpoint, ranks)
            out = arguments.out or arguments.what / "inspect"
        else:
            recipe, data, model, title = of_recipe(arguments.what, arguments.overrides, ranks)
            out = arguments.out or Path(recipe.run.root) / f"{recipe.name}-inspect"
        loaders = build_loaders(recipe.data, data, recipe.run.seed, device=ranks.device, epochs=recipe.optim.epochs)
        batches = first_batches(loaders.val or loaders.train, Normalize(data, ranks.device), arguments.batches)
        found = report(model, batches, oscillating_above=recipe.oscillation.oscillating_above)
    title += f" ({recipe.model.name} on {data.name}, inputs of {found.images} images of " \
             f"{'the holdout' if loaders.val else 'training: nothing is held out'})"
    whole = json.dumps({"title": title} | content(found), indent=1, allow_nan=False) if arguments.json else ""
    try:
        if arguments.json not in (None, "-"):
            Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(arguments.json), whole + "\n")
        pictures = [] if arguments.no_plot else plot(found, out, title)
    except OSError as error:
        raise InputError(f"cannot be written: {error}") from None
    print(whole if arguments.json == "-" else "\n".join([title, "", text(found), *map(str, pictures)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
