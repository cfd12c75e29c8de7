"""Figures of the effect of hyperparameters: the score against each, against pairs of them, and their importances.

All are at the common epoch of a study, which nearly all trials reached: later scores exist only for trials that earlier
scores selected. The marker of a trial shows how far it got after that epoch.
"""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tune.report.figures import BLUE, GREY, INK, LIGHT, ORANGE, SMALL, WIDE, SavedFigure, drawing, plain
from tune.report.findings import Comparison, Findings
from tune.report.importance import Importance
from tune.report.leaderboard import short
from tune.space import Sampler

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import PathCollection

COLUMNS = 3
MAX_PAIRS = 6
LEGEND_HEIGHT, ROW_HEIGHT = 0.5, 2.55  # inches
OUTLINE = "#404040"


class Marker(NamedTuple):
    """Color, form and area all show the same thing."""

    color: str
    form: str
    area: int


# from trials stopped at the first rung to trials that finished
MARKERS = [Marker("#bdbdbd", "o", 16), Marker("#9ecae1", "s", 18), Marker("#4292c6", "D", 20),
           Marker("#08519c", "^", 30), Marker("#08306b", "P", 40), Marker("#000000", "*", 60)]


def response_figure(findings: Findings, study: str, comparison: Comparison | None, path: Path) -> SavedFigure | None:
    """The score against each hyperparameter and against pairs of them; None if there is nothing to compare."""
    space, metric = findings.search.space, findings.search.metric
    if comparison is None or not space:
        return None
    pairs = list(itertools.combinations(space, 2))[:MAX_PAIRS]
    single_rows, pair_rows = -(-len(space) // COLUMNS), -(-len(pairs) // COLUMNS)
    height = LEGEND_HEIGHT + (single_rows + pair_rows) * ROW_HEIGHT
    label = f"{metric} at epoch {comparison.epoch}"
    # The grid has fixed margins: computing a layout would take longer than drawing.
    with drawing((WIDE, height), path, layout=None) as figure:
        grid = figure.subplots(single_rows + pair_rows, COLUMNS, squeeze=False, gridspec_kw={
            "left": 0.075, "right": 0.895, "top": 1 - LEGEND_HEIGHT / height, "bottom": 0.5 / height, "wspace": 0.42,
            "hspace": 0.42})
        single_panels, pair_panels = list(grid[:single_rows].flat), list(grid[single_rows:].flat)
        reached, ends = _epochs_reached(findings, study, comparison)
        for axes, name in zip(single_panels, space, strict=False):
            _draw_single(axes, space[name], name, comparison, reached, len(ends))
        for axes in single_panels[::COLUMNS]:
            axes.set_ylabel(label)
        points = None
        for axes, (x, y) in zip(pair_panels, pairs, strict=False):
            points = _draw_pair(axes, space, x, y, comparison)
        for axes in (*single_panels[len(space):], *pair_panels[len(pairs):]):
            axes.axis("off")
        if points is not None:
            bar = figure.add_axes((0.92, 0.5 / height, 0.014, (pair_rows * ROW_HEIGHT - 0.75) / height))
            figure.colorbar(points, cax=bar, label=label)
        figure.legend(handles=_legend(reached, ends, comparison), loc="upper left",
                      bbox_to_anchor=(0.06, 1 - 0.1 / height), ncols=7)
    sign = 1 if findings.search.mode == "max" else -1
    best = max(range(len(comparison)), key=lambda i: comparison.scores[i] * sign)
    values = ", ".join(f"{name} {short(comparison.results[best].trial.drawn[name])}" for name in space)
    return SavedFigure(
        path, f"{metric} of {len(comparison)} trials of study {study} at epoch {comparison.epoch}, against "
        f"{', '.join(space)} and against pairs of them. The best score, "
        f"{findings.format_score(comparison.scores[best])}, has {values}.",
        f"Scores of study {study} at epoch {comparison.epoch}, which nearly all trials reached. Top: against each "
        "hyperparameter; the marker shows how far the trial got. Bottom: against pairs, colored by score.", wide=True)


def _epochs_reached(findings: Findings, study: str, comparison: Comparison) -> tuple[list[int], list[int]]:
    """For each trial the index of the rung that it ended at, and the epochs of all rungs and of the last epoch."""
    ends = [*findings.rungs(study), findings.full_epochs[study]]
    return [sum(result.epochs > end for end in ends[:-1]) for result in comparison.results], ends


def _marker(reached: int, ends: int) -> Marker:
    return MARKERS[round(reached * (len(MARKERS) - 1) / (ends - 1))] if ends > 1 else MARKERS[3]


def _draw_single(axes: "Axes", sampler: Sampler, name: str, comparison: Comparison, reached: list[int],
                 ends: int) -> None:
    x = [coordinate(sampler, result.trial.drawn[name], result.trial.number) for result in comparison.results]
    for marker in sorted({_marker(step, ends) for step in reached}, key=lambda marker: marker.area):
        shown = [i for i, step in enumerate(reached) if _marker(step, ends) == marker and not comparison.imputed[i]]
        axes.scatter([x[i] for i in shown], [comparison.scores[i] for i in shown], color=marker.color,
                     marker=marker.form, s=marker.area, edgecolor=OUTLINE, linewidth=0.4, zorder=2 + marker.area / 100)
    diverged = [i for i, imputed in enumerate(comparison.imputed) if imputed]
    axes.scatter([x[i] for i in diverged], [comparison.scores[i] for i in diverged], color=ORANGE, marker="x", s=26,
                 linewidth=1.2)
    set_scale(axes.xaxis, sampler)
    axes.set_xlabel(plain(name))
    axes.grid(axis="y", color="#ececec", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_pair(axes: "Axes", space: dict[str, Sampler], x: str, y: str, comparison: Comparison) -> "PathCollection":
    """Returns the colored points."""
    known = sorted(score for score, imputed in zip(comparison.scores, comparison.imputed, strict=True) if not imputed)
    low, high = known[len(known) // 20], known[-1 - len(known) // 20]  # outliers would leave one color for all others
    at = [(coordinate(space[x], result.trial.drawn[x], result.trial.number),
           coordinate(space[y], result.trial.drawn[y], result.trial.number + 1)) for result in comparison.results]
    shown = [i for i in range(len(comparison)) if not comparison.imputed[i]]
    points = axes.scatter([at[i][0] for i in shown], [at[i][1] for i in shown], c=[comparison.scores[i] for i in shown],
                          cmap="viridis", vmin=low, vmax=high, s=30, edgecolor=OUTLINE, linewidth=0.4)
    diverged = [i for i in range(len(comparison)) if comparison.imputed[i]]
    axes.scatter([at[i][0] for i in diverged], [at[i][1] for i in diverged], color=ORANGE, marker="x", s=26,
                 linewidth=1.2)
    set_scale(axes.xaxis, space[x])
    set_scale(axes.yaxis, space[y])
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    return points


def coordinate(sampler: Sampler, value: Any, number: int) -> float:
    """A value's place on its axis. Choices: the index, shifted a little by the trial's number to separate points."""
    if sampler.sample == "choice":
        return sampler.values.index(value) + 0.3 * ((number * 0.618) % 1 - 0.5)
    return value


def set_scale(axis: "Axis", sampler: Sampler) -> None:
    """Give one of the two axes of a panel the sampler's scale and range."""
    is_x = axis is axis.axes.xaxis
    if sampler.sample == "choice":
        low, high = -0.5, len(sampler.values) - 0.5
        axis.set_ticks(range(len(sampler.values)), [plain(str(value)[:12]) for value in sampler.values])
    else:
        assert sampler.low is not None and sampler.high is not None
        low, high = sampler.low, sampler.high
        if sampler.sample == "loguniform":
            (axis.axes.set_xscale if is_x else axis.axes.set_yscale)("log")
            margin = (high / low) ** 0.04
            low, high = low / margin, high * margin
        else:
            margin = 0.04 * (high - low)
            low, high = low - margin, high + margin
    (axis.axes.set_xlim if is_x else axis.axes.set_ylim)(low, high)


def _legend(reached: list[int], ends: list[int], comparison: Comparison) -> "list[Artist]":
    from matplotlib.lines import Line2D
    handles: list[Artist] = []
    for step in sorted(set(reached)):
        marker = _marker(step, len(ends))
        handles.append(Line2D([], [], color=marker.color, marker=marker.form, markersize=math.sqrt(marker.area),
                              linestyle="none", markeredgecolor=OUTLINE, markeredgewidth=0.4,
                              label=f"up to epoch {ends[step]}"))
    if any(comparison.imputed):
        handles.append(Line2D([], [], color=ORANGE, marker="x", markersize=5, linestyle="none",
                              label="diverged earlier"))
    return handles


def importance_figure(study: str, importance: Importance, path: Path) -> SavedFigure | None:
    """Importances with their spread, and the shares with shuffled scores; None if there are no importances."""
    if importance.reason:
        return None
    mean, spread, chance = importance.mean, importance.spread, importance.chance
    names = sorted(mean, key=lambda name: mean[name])
    labels, rows = [plain(name) for name in names], range(len(names))
    with drawing((SMALL[0], 1.15 + 0.36 * len(names)), path) as figure:
        axes = figure.subplots()
        axes.barh(labels, [mean[name] for name in names], color=BLUE, height=0.55, zorder=2)
        axes.errorbar([mean[name] for name in names], rows, xerr=[spread[name] for name in names], linestyle="none",
                      color=INK, capsize=3, elinewidth=1.1, zorder=3)
        if chance:
            axes.plot([chance[name] for name in names], rows, marker="|", markersize=15, markeredgewidth=2,
                      color=ORANGE, linestyle="none", zorder=4, label="shuffled scores")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), markerscale=0.5, borderpad=0)
        axes.set_xlim(0, 1.02)
        axes.set_xlabel(f"share of the variance at epoch {importance.epoch}")
        axes.set_title(plain(f"study {study}"))
        axes.grid(axis="x", color=LIGHT, linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_color(GREY)
    listed = ", ".join(f"{name} {mean[name]:.2f} plus or minus {spread[name]:.2f}"
                       + (f" (shuffled {chance[name]:.2f})" if chance else "") for name in reversed(names))
    return SavedFigure(
        path, f"Importance of each hyperparameter in study {study} at epoch {importance.epoch}: {listed}.",
        f"Importance in study {study}: fANOVA over {importance.trials} trials, mean and standard deviation over "
        "bootstrap samples.")
