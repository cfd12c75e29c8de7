"""A report as pictures: histograms with levels and thresholds, and the staircase of each quantizer.

    overview.png       the SNR of every layer, and panels of the first layer, the last one and the noisiest ones
    layers-01.png ...  panels of all quantized layers, if the overview does not show all of them

Per-channel quantizers are drawn in units of the mean step of each channel. Lines are then medians over the channels;
the staircases of some channels are drawn in a lighter colour.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nulsq.errors import require
from nulsq.files import replacing
from nulsq.inspect.fidelity import Fidelity
from nulsq.inspect.measure import LayerReport, Report
from nulsq.inspect.table import decibels, describe

PER_PAGE, PER_ROW = 8, 2  # layers on a page and in a row
MOST_LINES = 17  # up to this number, levels are drawn as lines with thresholds between them; otherwise as ticks
WIDTH, ROW, HEAD, FOOT, CHART, LETTER = 17.0, 3.9, 0.95, 0.5, 2.4, 0.06  # inches
LONGEST = 42  # letters of a name below the chart
COLORS = {"weight": "#8fb3d9", "input": "#bdbdbd", "level": "#b2182b", "threshold": "#404040",
          "channel": "#f0b8b0"}
CHANNELS = 12  # staircases of single channels, at most


def plot(report: Report, folder: Path | str, title: str = "") -> list[Path]:
    """Write the pictures into a folder; creates it. Returns their paths; [] for a float network.

    Raises InputError where matplotlib is not installed.
    """
    require("matplotlib", "train").use("Agg")
    layers = [layer for layer in report.layers if layer.weight is not None or layer.activation is not None]
    if not layers:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shown = _selected(layers)
    paths = [_page(folder / "overview.png", shown, title, chart=layers)]
    if len(shown) < len(layers):
        for number, start in enumerate(range(0, len(layers), PER_PAGE), 1):
            page = layers[start:start + PER_PAGE]
            which = f"layers {start + 1} to {start + len(page)} of {len(layers)}"
            paths.append(_page(folder / f"layers-{number:02d}.png", page, f"{title}: {which}" if title else which))
    return paths


def _selected(layers: list[LayerReport]) -> list[LayerReport]:
    """At most one page of layers, in order: the first, the last, and those with the lowest SNR of a side."""
    def worst(layer: LayerReport) -> float:
        ratios = [side.snr for side in (layer.weight, layer.activation) if side is not None]
        return min((ratio for ratio in ratios if ratio == ratio), default=float("inf"))

    inner = sorted(range(1, len(layers) - 1), key=lambda i: worst(layers[i]))
    selected = {0, len(layers) - 1, *inner[:PER_PAGE - 2]}
    return [layer for i, layer in enumerate(layers) if i in selected]


def _page(path: Path, layers: list[LayerReport], title: str, chart: list[LayerReport] | None = None) -> Path:
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = -(-len(layers) // PER_ROW)
    above = CHART + 0.4 + LETTER * min(LONGEST, max(len(layer.name) for layer in chart)) if chart else 0
    height = HEAD + above + rows * ROW + FOOT
    figure = pyplot.figure(figsize=(WIDTH, height))
    figure.suptitle(title, x=0.012, y=1 - 0.15 / height, ha="left", va="top",
                    fontsize=min(12.0, 2000 / max(len(title), 1)))
    figure.legend(handles=[
        Patch(color=COLORS["weight"], label="weights"), Patch(color=COLORS["input"], label="inputs (log scale)"),
        Line2D([], [], color=COLORS["level"], label=f"level, staircase (ticks: more than {MOST_LINES} levels)"),
        Line2D([], [], color=COLORS["channel"], linewidth=0.8, label="staircases of single channels"),
        Line2D([], [], color=COLORS["threshold"], linestyle="--", linewidth=0.8, label="threshold"),
    ], loc="upper left", bbox_to_anchor=(0.005, 1 - 0.38 / height), ncols=5, fontsize=9, frameon=False)
    if chart:
        _chart(figure.add_axes((0.045, 1 - (HEAD + CHART) / height, 0.945, CHART / height)), chart)

    top = 1 - (HEAD + above + 0.5) / height  # half an inch for the titles of the first row
    grid: Any = figure.add_gridspec(rows, PER_ROW, left=0.045, right=0.99, top=top, bottom=(FOOT + 0.1) / height,
                                    wspace=0.13, hspace=0.52)
    for cell, layer in zip(grid, layers, strict=False):
        inner = cell.subgridspec(2, 2, height_ratios=[3, 2], hspace=0.08, wspace=0.24)
        roles = f"  ({', '.join(layer.roles)})" if layer.roles else ""
        left, right = ([figure.add_subplot(inner[i, j]) for i in range(2)] for j in range(2))
        left[0].text(0, 1.32, _shortened(layer.name, 70) + roles, transform=left[0].transAxes, fontsize=11,
                     fontweight="bold")
        _draw(left[0], left[1], layer.weight, "weight", layer.normalization)
        _draw(right[0], right[1], layer.activation, "input")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=85, format="png")
    pyplot.close(figure)
    return path


def _chart(axis: Any, layers: list[LayerReport]) -> None:
    """SNR over the depth of the network."""
    for side, color, marker in (("weight", "#2166ac", "o"), ("activation", "#d6604d", "s")):
        sides = [getattr(layer, side) for layer in layers]
        axis.plot([float("nan") if fidelity is None else fidelity.snr for fidelity in sides], marker=marker,
                  color=color, linewidth=1, markersize=5, label={"activation": "input"}.get(side, side))
    axis.set_xticks(range(len(layers)), [_shortened(layer.name, LONGEST) for layer in layers], rotation=90,
                    fontsize=min(8.0, 900 / len(layers)))
    axis.set_xlim(-0.5, len(layers) - 0.5)
    axis.set_ylabel("SNR [dB]")
    axis.grid(axis="y", color="0.9")
    axis.legend(loc="best", fontsize=9)


def _draw(upper: Any, lower: Any, side: Fidelity | None, name: str, normalization: str = "none") -> None:
    """Draw the histogram into the upper panel and the staircase into the lower one. name: "weight" or "input"."""
    if side is None or not side.count or side.levels is None or side.thresholds is None:
        upper.text(0.5, 0.5, f"{name}: {'float' if side is None else 'not measured'}", ha="center", va="center",
                   color="0.4", transform=upper.transAxes)
        for axis in (upper, lower):
            axis.axis("off")
        return
    all_levels, all_thresholds = _in_steps(side, side.levels), _in_steps(side, side.thresholds)
    levels, thresholds = all_levels.median(0).values, all_thresholds.median(0).values
    low, high = _view(side.sample, levels)
    inside = side.sample[(side.sample >= low) & (side.sample <= high)]
    bins = min(100, max(20, int(2 * len(side.sample) ** (1 / 3))))
    upper.stairs(torch.histc(inside, bins, low, high) / len(side.sample), torch.linspace(low, high, bins + 1),
                 fill=True, color=COLORS[name])
    if name == "input":
        upper.set_yscale("log")  # after a ReLU most values are zero
        upper.set_ylim(0.5 / len(side.sample), 1.5)
    lines = {"transform": upper.get_xaxis_transform(), "color": COLORS["level"]}
    if len(levels) <= MOST_LINES:
        upper.vlines(thresholds, 0, 1, linewidth=0.8, linestyle="--", **lines | {"color": COLORS["threshold"]})
        upper.vlines(levels, 0, 1, linewidth=1.3, **lines)
    else:
        upper.vlines(levels, 0, 0.06, linewidth=0.5, **lines)
    upper.set_title(f"{name}: {describe(side, normalization)}, {side.quantizer.bits} bit\n{len(levels)} levels, "
                    f"SNR {decibels(side.snr)} dB, {100 * side.clipped:.2f} % clipped", fontsize=9, loc="left")
    upper.set_ylabel("share", fontsize=9)
    upper.tick_params(labelbottom=False)

    lower.plot([low, high], [low, high], color="0.7", linewidth=0.8, linestyle=":")
    if side.quantizer.channels:
        every = -(-len(all_levels) // CHANNELS)
        for of_channel in zip(all_levels[::every], all_thresholds[::every], strict=True):
            _staircase(lower, *of_channel, low, high, color=COLORS["channel"], linewidth=0.8)
    _staircase(lower, levels, thresholds, low, high, color=COLORS["level"], linewidth=1.3)
    unit = " / mean step of its channel" if side.quantizer.channels else ""
    normalized = "normalized " if normalization != "none" else ""
    lower.set_xlabel(f"{normalized}{name}{unit}", fontsize=9)
    lower.set_ylabel("quantized", fontsize=9)
    for axis in (upper, lower):
        axis.set_xlim(low, high)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(nbins=7)


def _staircase(axis: Any, levels: Tensor, thresholds: Tensor, low: float, high: float, **style: Any) -> None:
    ends = torch.cat([torch.tensor([low]), thresholds, torch.tensor([high])])
    axis.plot(ends.repeat_interleave(2)[1:-1], levels.repeat_interleave(2), **style)


def _in_steps(side: Fidelity, values: Tensor) -> Tensor:
    """The values as [1, L] or, per channel, as [C, L] in units of each channel's mean step."""
    return (values / side.unit[:, None] if side.quantizer.channels else values[None]).float()


def _view(sample: Tensor, levels: Tensor) -> tuple[float, float]:
    """Limits of the axis: all levels, and the values without far outliers."""
    bottom, top = float(levels[0]), float(levels[-1])
    least, most = sample.quantile(torch.tensor([0.001, 0.999])).tolist()
    low, high = max(min(least, bottom), 2 * bottom - top), min(max(most, top), 2 * top - bottom)
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _shortened(name: str, length: int) -> str:
    half = length // 2 - 1
    return name if len(name) <= length else f"{name[:half]}...{name[-half:]}"
