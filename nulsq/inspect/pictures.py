"""A report as pictures: histograms with the levels and thresholds over them, and the staircase of each quantizer.

    overview.png       the SNR of every layer, and the panels of some: the first, the last, the noisiest
    layers-01.png ...  the panels of all quantized layers, where the overview could not show them

Per-channel quantizers are drawn in units of the mean step of each channel. Lines are then medians over the channels,
and the staircases of some channels stand behind that of the median.
"""

from pathlib import Path

import torch
from torch import Tensor

from nulsq.errors import require
from nulsq.inspect.fidelity import Fidelity
from nulsq.inspect.measure import LayerReport, Report
from nulsq.inspect.table import decibels, describe

PER_PAGE, BESIDE = 8, 2  # layers on a page, and beside each other
FEW = 17  # up to so many levels are drawn as lines with thresholds between them; more of them as ticks
WIDTH, ROW, HEAD, FOOT, CHART, LETTER = 17.0, 3.9, 0.95, 0.5, 2.4, 0.06  # inches
LONGEST = 42  # letters of a name under the chart
COLORS = {"weight": "#8fb3d9", "input": "#bdbdbd", "level": "#b2182b", "threshold": "#404040",
          "channel": "#f0b8b0"}
CHANNELS = 12  # staircases of single channels, at most


def plot(report: Report, folder: Path | str, title: str = "") -> list[Path]:
    """Write the pictures into a folder, which is made. Returns their paths; none for a float network.

    Raises InputError where matplotlib is not installed.
    """
    require("matplotlib", "train").use("Agg")
    layers = [layer for layer in report.layers if layer.weight is not None or layer.activation is not None]
    if not layers:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = _most_telling(layers)
    made = [_page(folder / "overview.png", shown, title, chart=layers)]
    if len(shown) < len(layers):
        for number, start in enumerate(range(0, len(layers), PER_PAGE), 1):
            page = layers[start:start + PER_PAGE]
            which = f"layers {start + 1} to {start + len(page)} of {len(layers)}"
            made.append(_page(folder / f"layers-{number:02d}.png", page, f"{title}: {which}" if title else which))
    return made


def _most_telling(layers: list[LayerReport]) -> list[LayerReport]:
    """At most a page, in order: the first, the last, and those with the lowest SNR on either side."""
    def worst(layer):
        ratios = [side.snr for side in (layer.weight, layer.activation) if side is not None]
        return min((ratio for ratio in ratios if ratio == ratio), default=float("inf"))

    inner = sorted(range(1, len(layers) - 1), key=lambda i: worst(layers[i]))
    kept = {0, len(layers) - 1, *inner[:PER_PAGE - 2]}
    return [layer for i, layer in enumerate(layers) if i in kept]


def _page(path: Path, layers: list[LayerReport], title: str, chart: list[LayerReport] | None = None) -> Path:
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = -(-len(layers) // BESIDE)
    above = CHART + 0.4 + LETTER * min(LONGEST, max(len(layer.name) for layer in chart)) if chart else 0
    height = HEAD + above + rows * ROW + FOOT
    figure = pyplot.figure(figsize=(WIDTH, height))
    figure.suptitle(title, x=0.012, y=1 - 0.15 / height, ha="left", va="top",
                    fontsize=min(12.0, 2000 / max(len(title), 1)))
    figure.legend(handles=[
        Patch(color=COLORS["weight"], label="weights"), Patch(color=COLORS["input"], label="inputs (log scale)"),
        Line2D([], [], color=COLORS["level"], label=f"level, staircase (ticks: more than {FEW} levels)"),
        Line2D([], [], color=COLORS["channel"], linewidth=0.8, label="staircases of single channels"),
        Line2D([], [], color=COLORS["threshold"], linestyle="--", linewidth=0.8, label="threshold"),
    ], loc="upper left", bbox_to_anchor=(0.005, 1 - 0.38 / height), ncols=5, fontsize=9, frameon=False)
    if chart:
        _ratios(figure.add_axes([0.045, 1 - (HEAD + CHART) / height, 0.945, CHART / height]), chart)

    top = 1 - (HEAD + above + 0.5) / height  # the last half inch is the titles' of the first row
    grid = figure.add_gridspec(rows, BESIDE, left=0.045, right=0.99, top=top, bottom=(FOOT + 0.1) / height, wspace=0.13,
                               hspace=0.52)
    for cell, layer in zip(grid, layers, strict=False):
        inner = cell.subgridspec(2, 2, height_ratios=[3, 2], hspace=0.08, wspace=0.24)
        roles = f"  ({', '.join(layer.roles)})" if layer.roles else ""
        axes = [[figure.add_subplot(inner[i, j]) for i in range(2)] for j in range(2)]
        axes[0][0].text(0, 1.32, _shortened(layer.name, 70) + roles, transform=axes[0][0].transAxes, fontsize=11,
                        fontweight="bold")
        _draw(*axes[0], layer.weight, "weight", layer.normalization)
        _draw(*axes[1], layer.activation, "input")
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=85)
    pyplot.close(figure)
    aside.replace(path)
    return path


def _ratios(axis, layers: list[LayerReport]) -> None:
    """SNR over the depth of the network."""
    for side, color, marker in (("weight", "#2166ac", "o"), ("activation", "#d6604d", "s")):
        found = [getattr(layer, side) for layer in layers]
        axis.plot([float("nan") if each is None else each.snr for each in found], marker=marker, color=color,
                  linewidth=1, markersize=5, label={"activation": "input"}.get(side, side))
    axis.set_xticks(range(len(layers)), [_shortened(layer.name, LONGEST) for layer in layers], rotation=90,
                    fontsize=min(8.0, 900 / len(layers)))
    axis.set_xlim(-0.5, len(layers) - 0.5)
    axis.set_ylabel("SNR [dB]")
    axis.grid(axis="y", color="0.9")
    axis.legend(loc="best", fontsize=9)


def _draw(above, under, side: Fidelity | None, what: str, normalization: str = "none") -> None:
    """Histogram in the upper panel, staircase in the lower one."""
    if side is None or not side.count:
        above.text(0.5, 0.5, f"{what}: {'float' if side is None else 'not measured'}", ha="center", va="center",
                   color="0.4", transform=above.transAxes)
        for axis in (above, under):
            axis.axis("off")
        return
    of_channels = [_in_steps(side, each) for each in (side.levels, side.thresholds)]
    levels, thresholds = (each.median(0).values for each in of_channels)
    low, high = _view(side.sample, levels)
    inside = side.sample[(side.sample >= low) & (side.sample <= high)]
    bins = min(100, max(20, int(2 * len(side.sample) ** (1 / 3))))
    above.stairs(torch.histc(inside, bins, low, high) / len(side.sample), torch.linspace(low, high, bins + 1),
                 fill=True, color=COLORS[what])
    if what == "input":
        above.set_yscale("log")  # after a ReLU most values are zero
        above.set_ylim(0.5 / len(side.sample), 1.5)
    lines = {"transform": above.get_xaxis_transform(), "color": COLORS["level"]}
    if len(levels) <= FEW:
        above.vlines(thresholds, 0, 1, linewidth=0.8, linestyle="--", **lines | {"color": COLORS["threshold"]})
        above.vlines(levels, 0, 1, linewidth=1.3, **lines)
    else:
        above.vlines(levels, 0, 0.06, linewidth=0.5, **lines)
    above.set_title(f"{what}: {describe(side, normalization)}, {side.quantizer.bits} bit\n{len(levels)} levels, "
                    f"SNR {decibels(side.snr)} dB, {100 * side.clipped:.2f} % clipped", fontsize=9, loc="left")
    above.set_ylabel("share", fontsize=9)
    above.tick_params(labelbottom=False)

    under.plot([low, high], [low, high], color="0.7", linewidth=0.8, linestyle=":")
    for one in zip(*(each[::-(-len(each) // CHANNELS)] for each in of_channels), strict=True):
        if side.quantizer.channels:
            _staircase(under, *one, low, high, color=COLORS["channel"], linewidth=0.8)
    _staircase(under, levels, thresholds, low, high, color=COLORS["level"], linewidth=1.3)
    unit = " / mean step of its channel" if side.quantizer.channels else ""
    normalized = "normalized " if normalization != "none" else ""
    under.set_xlabel(f"{normalized}{what}{unit}", fontsize=9)
    under.set_ylabel("quantized", fontsize=9)
    for axis in (above, under):
        axis.set_xlim(low, high)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(nbins=7)


def _staircase(axis, levels: Tensor, thresholds: Tensor, low: float, high: float, **style) -> None:
    ends = torch.cat([torch.tensor([low]), thresholds, torch.tensor([high])])
    axis.plot(ends.repeat_interleave(2)[1:-1], levels.repeat_interleave(2), **style)


def _in_steps(side: Fidelity, values: Tensor) -> Tensor:
    """[1, L] as they are or, per channel, [C, L] in units of each channel's mean step."""
    return (values / side.unit[:, None] if side.quantizer.channels else values[None]).float()


def _view(sample: Tensor, levels: Tensor) -> tuple[float, float]:
    """The part of the axis that is drawn: all levels, and those of the values that are not far out."""
    bottom, top = float(levels[0]), float(levels[-1])
    least, most = sample.quantile(torch.tensor([0.001, 0.999])).tolist()
    low, high = max(min(least, bottom), 2 * bottom - top), min(max(most, top), 2 * top - bottom)
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _shortened(name: str, length: int) -> str:
    half = length // 2 - 1
    return name if len(name) <= length else f"{name[:half]}...{name[-half:]}"
