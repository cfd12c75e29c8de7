"""Inspect a network: the effects of its quantizers on the values of each layer, and its costs.

    python -m nulsq.inspect runs/digits-w2a2-0                              # a run, with the weights that are evaluated
    python -m nulsq.inspect configs/recipes/digits/w2a2.yaml quant.bits=3   # a recipe before training, calibrated
    python -m nulsq.inspect runs/digits-w2a2-0 --no-plot --json - | jq .totals

Prints a line for the weight and one for the input of each layer:

    levels                used / available
    step size             distance between neighbouring levels, smallest .. largest
    clipped               share of values beyond the end levels
    SNR                   signal to quantization noise, 10 log10(sum x^2 / sum (x - Q(x))^2); about 6 dB per bit
    entropy               of the level numbers, in bits: the information that the quantized values carry
    oscillating, frozen   shares of the weights, if the run tracks them

Then it prints totals for one image: average bits, bytes with packed weights, multiply-accumulates, bit operations. It
writes pictures into --out: overview.png with histograms, levels, thresholds and staircases, and further pages if the
overview does not show all layers. Inputs are measured in float32 on holdout images, or on training images if the recipe
has no holdout; never on test images.
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
    """A run's recipe, data set and trained network, and a title. `which`: auto, best or last checkpoint."""
    recipe = read_recipe(run)
    content = checkpoint.load_chosen(run, which)
    data = DataSet(recipe.data.path)
    model = trained_network(recipe, content, len(data.classes)).to(ranks.device)
    return recipe, data, model, f"{run}, after epoch {content['epoch']}"


def of_recipe(path: Path, overrides: list[str], ranks: Ranks) -> tuple[Recipe, DataSet, nn.Module, str]:
    """A recipe, its data set, its calibrated network at the start of training, and a title."""
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


def _is_run(path: Path, overrides: list[str]) -> bool:
    """Whether the path is a run directory rather than a recipe. Raises InputError, with a hint, if it is neither."""
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            inside = sorted(str(recipe.parent) for recipe in path.glob("*/recipe.yaml"))
            raise InputError(f"{path} is not a run directory (no recipe.yaml)"
                             + (f"; in it there are: {', '.join(inside[:6])}" if inside else ""))
        if overrides:
            raise InputError(f"{overrides[0]}: a run is shown as it was trained; settings belong to a recipe")
        return True
    if path.suffix in (".yaml", ".yml"):
        return False
    if path.exists():
        raise InputError(f"{path} is neither a run directory nor a recipe (.yaml)")
    runs = [str(recipe.parent) for recipe in path.parent.glob("*/recipe.yaml")]
    raise InputError(f"no run directory or recipe {path}.{did_you_mean(path, runs, count=3, cutoff=0.5)}")


def parser() -> Parser:
    parser = Parser(prog="python -m nulsq.inspect", description=__doc__)
    parser.add_argument("what", type=Path, metavar="RUN|RECIPE", help="run directory, or recipe (.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings of a recipe")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (RUN/inspect; for a recipe "
                        "ROOT/NAME-inspect, next to its future run)")
    parser.add_argument("--batches", type=int, default=2, metavar="N",
                        help="batches of images on which inputs are measured (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all measurements, with levels and steps, into FILE; "
                        "- prints them instead of the table")
    parser.add_argument("--no-plot", action="store_true", help="no pictures; matplotlib is not needed")
    parser.add_argument("--checkpoint", choices=["auto", "best", "last"], default="auto",
                        help="of a run; auto: best if there is one")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    if arguments.batches < 1:
        raise InputError(f"--batches {arguments.batches}, allowed: at least 1")
    is_run = _is_run(arguments.what, arguments.overrides)
    if not is_run and arguments.checkpoint != "auto":
        raise InputError(f"--checkpoint {arguments.checkpoint}: only a run has checkpoints, not a recipe")
    if not arguments.no_plot:
        require("matplotlib", "train")  # before minutes are spent
    with join_ranks(arguments.device) as ranks:
        if ranks.size > 1:
            raise InputError(f"inspection runs in one process, not on {ranks.size} ranks")
        if is_run:
            recipe, data, model, title = of_run(arguments.what, arguments.checkpoint, ranks)
            out = arguments.out or arguments.what / "inspect"
        else:
            recipe, data, model, title = of_recipe(arguments.what, arguments.overrides, ranks)
            out = arguments.out or Path(recipe.run.root) / f"{recipe.name}-inspect"
        loaders = build_loaders(recipe.data, data, recipe.run.seed, device=ranks.device, epochs=recipe.optim.epochs)
        batches = first_batches(loaders.val or loaders.train, Normalize(data, ranks.device), arguments.batches)
        measured = report(model, batches, oscillating_above=recipe.oscillation.oscillating_above)
    title += f" ({recipe.model.name} on {data.name}, inputs of {measured.images} images of " \
             f"{'the holdout' if loaders.val else 'training: nothing is held out'})"
    output = json.dumps({"title": title} | content(measured), indent=1, allow_nan=False) if arguments.json else ""
    try:
        if arguments.json not in (None, "-"):
            Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(arguments.json), output + "\n")
        pictures = [] if arguments.no_plot else plot(measured, out, title)
    except OSError as error:
        raise InputError(f"cannot be written: {error}") from None
    print(output if arguments.json == "-" else "\n".join([title, "", text(measured), *map(str, pictures)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
