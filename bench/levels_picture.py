"""Picture of the README: the levels that nuLSQ has learned, over a histogram of the activations that they quantize.

    python -m nulsq.train configs/recipes/digits/w2a2.yaml quant.bits=3 quant.activation.init=lloyd_max \\
        run.train_id=levels
    python -m bench.levels_picture runs/digits-w2a2-levels --out docs/levels.svg

The first command starts from the float network of `configs/recipes/digits/float.yaml`. The histogram shows the input of
one layer on images of the holdout, as the quantized network computes it. The strip under it compares the learned levels
with a uniform grid of the same range. An .svg has the same bytes every time.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import nulsq
from nulsq.data import DataSet, Normalize, build_loader
from nulsq.errors import InputError, Parser, did_you_mean, exit_on_input_error, require
from nulsq.inspect import Fidelity, report
from nulsq.quantizers.nulsq import NuLSQ
from nulsq.run.directory import read_recipe
from nulsq.training.validate import first_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES, BINS = 4, 110
PAPER, INK, SOFT, FAINT = "#fbfbf8", "#24292f", "#57606a", "#8a8f96"  # background, text, secondary text, lines
BARS, LEVEL, UNIFORM = "#a9c3dc", "#c0362c", "#6e7781"
STARTS = {"lloyd_max": "Lloyd-Max", "nmse": "NMSE", "lsq": "LSQ's rule", "const": "a constant"}
STYLE = {"svg.hashsalt": "nulsq", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10,
         "text.color": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "axes.linewidth": 0.8}


def measure(run: Path) -> dict[str, Fidelity]:
    """Layer name -> the nuLSQ quantizer of its input and the values that reach it, for all unsigned inputs of a run.

    Raises InputError if there is none, and for a run without a holdout.
    """
    recipe = read_recipe(run)
    data = DataSet(recipe.data.path)
    holdout = build_loader(recipe.data, data, "val")
    batches = first_batches(holdout, Normalize(data, torch.device("cpu")), BATCHES)
    sides = {layer.name: layer.activation for layer in report(nulsq.load_run(run), batches).layers
             if layer.activation is not None and isinstance(layer.activation.quantizer, NuLSQ)
             and not layer.activation.quantizer.signed}
    if not sides:
        raise InputError(f"{run}: no layer has an unsigned nuLSQ quantizer on its input")
    return sides


def choose(names: list[str], name: str | None) -> str:
    """The name itself if it is one of `names`; without a name the one in the middle. Raises InputError."""
    if name is None:
        return names[len(names) // 2]
    if name not in names:
        raise InputError(f"--layer {name}: not known.{did_you_mean(name, names)} Allowed: {', '.join(names)}")
    return name


def flat(values: Tensor | None) -> list[float]:
    assert values is not None  # measured on at least one batch
    return values.flatten().tolist()


def draw(side: Fidelity, out: Path) -> None:
    """Write the picture, 8 x 4.2 inches; the suffix of `out` names the format."""
    matplotlib = require("matplotlib", "train")
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        figure = _figure(side)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _figure(side: Fidelity) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    levels, thresholds = flat(side.levels), flat(side.thresholds)
    left, right = -0.035 * levels[-1], 1.2 * levels[-1]
    figure = Figure(figsize=(8, 4.2), facecolor="none")
    figure.add_artist(FancyBboxPatch((0.012, 0.02), 0.976, 0.96, boxstyle="round,pad=0,rounding_size=0.02",
                                     mutation_aspect=8 / 4.2, facecolor=PAPER, edgecolor="#d0d7de", zorder=-10))
    above = figure.add_axes((0.045, 0.345, 0.91, 0.42))
    strip = figure.add_axes((0.045, 0.06, 0.91, 0.22))
    figure.text(0.045, 0.915, f"{len(levels)} levels, learned where the activations are", fontsize=14,
                fontweight="bold")
    start = STARTS.get(side.quantizer.init, side.quantizer.init)
    figure.text(0.045, 0.863, f"Input of one layer, {side.quantizer.bits} bits. Step sizes start from {start}; "
                "nuLSQ trains each one by gradient descent.", fontsize=9, color=SOFT)

    # ---- histogram; values of exactly zero would dwarf the rest
    positive = side.sample[side.sample > 0]
    counts = torch.histc(positive[positive < right], BINS, 0, right)
    counts = counts / counts.max()
    above.stairs(counts, torch.linspace(0, right, BINS + 1), fill=True, color=BARS)
    above.vlines(thresholds, 0, 1.02, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    above.vlines(levels, 0, 1.12, color=LEVEL, linewidth=2)
    above.plot(levels, [1.12] * len(levels), "o", color=LEVEL, markersize=5)
    zeros = 100 * float((side.sample <= 0).float().mean())
    handles = [above.plot([], [], color=LEVEL, linewidth=2, marker="o", markersize=5, label="learned level")[0],
               above.plot([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="threshold")[0],
               above.stairs([0], [0, 0], fill=True, color=BARS, label=f"activations above 0 ({zeros:.0f} % are 0)")]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.045, 0.832), frameon=False, fontsize=9, ncols=3,
                  borderaxespad=0, borderpad=0, handlelength=1.8, columnspacing=1.6)
    above.set_ylim(0, 1.2)

    # ---- strip: learned and uniform levels on one axis
    uniform = torch.linspace(0, levels[-1], len(levels)).tolist()
    for y, row, color, words in ((1, levels, LEVEL, "nuLSQ steps"), (0, uniform, UNIFORM, "uniform steps")):
        strip.plot([row[0], row[-1]], [y, y], color=color, linewidth=1.2, zorder=1)
        strip.plot(row, [y] * len(row), "o", color=color, markersize=5.5, zorder=2)
        strip.text(levels[-1] * 1.025, y, words, va="center", color=color, fontweight="bold", fontsize=9.5)
        for low, high in zip(row, row[1:], strict=False):
            strip.text((low + high) / 2, y + (0.22 if y else -0.24), f"{high - low:.2f}", ha="center",
                       va="bottom" if y else "top", color=color, fontsize=8)
    for learned, even in zip(levels, uniform, strict=True):
        strip.plot([learned, even], [0.86, 0.14], color=FAINT, linewidth=0.7, zorder=0)
    strip.set_ylim(-0.8, 1.75)
    for axis in (above, strip):
        axis.patch.set_visible(False)
        axis.set_xlim(left, right)
        axis.set_yticks([])
        axis.spines[["left", "right", "top"]].set_visible(False)
    strip.set_xticks([])
    strip.spines["bottom"].set_visible(False)
    above.tick_params(labelsize=8.5, length=3)
    return figure


def parser() -> Parser:
    parser = Parser(prog="python -m bench.levels_picture", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/digits-w2a2-levels"),
                        help="run directory with nuLSQ activations (%(default)s)")
    parser.add_argument("--layer", metavar="NAME", help="whose input is drawn; default: the one in the middle")
    parser.add_argument("--out", type=Path, default=Path("docs/levels.svg"), metavar="FILE", help="(%(default)s)")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    sides = measure(arguments.run)
    name = choose(list(sides), arguments.layer)
    draw(sides[name], arguments.out)
    print(f"{arguments.out}: input of {name}, levels {', '.join(f'{level:.3f}' for level in flat(sides[name].levels))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
