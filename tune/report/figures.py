"""Figures of a search: learning curves, Pareto fronts, the timeline. Each has a caption and a description in words for
readers who cannot see it.

There is one small figure per study instead of one large figure of all: a page lays small ones out side by side on a
wide screen and below each other on a phone, and eighteen studies are as readable as two. They share their axes.
"""

import base64
import contextlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nulsq.errors import require
from nulsq.files import replacing
from tune.report.findings import Findings
from tune.report.pareto import COSTS, front_of, pareto_points
from tune.report.timeline import Timeline
from tune.store.results import Finalist, TrialResult
from tune.store.status import SearchStatus, TrialStatus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL, WIDE = (4.6, 3.2), 9.0  # inches: size of a small figure, width of a wide one
BLUE, ORANGE, GREY, LIGHT, INK = "#0072b2", "#d55e00", "#8c8c8c", "#d9d9d9", "#262626"
DARK_GREY = "#595959"
STYLE = {"font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.edgecolor": DARK_GREY, "axes.labelcolor": INK, "xtick.color": "#404040",
         "ytick.color": "#404040", "text.color": INK, "legend.frameon": False, "legend.fontsize": 8.5,
         "figure.dpi": 144, "savefig.dpi": 144, "axes.titlepad": 8}
MAX_LABELED = 12  # with more studies, only those on the Pareto front are labeled
# status -> color and hatch of its bars in the timeline
BARS = {TrialStatus.FINISHED: (BLUE, ""), TrialStatus.STOPPED: ("#a6cee3", ""), TrialStatus.DIVERGED: (ORANGE, "xx"),
        TrialStatus.FAILED: ("#b2182b", "//"), TrialStatus.RUNNING: (LIGHT, "")}


@dataclass
class SavedFigure:
    """A PNG file with its caption."""

    path: Path
    alt: str  # what it shows, in words
    caption: str
    wide: bool = False

    @property
    def data_url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height, from the header of the file."""
        width, height = struct.unpack(">II", self.path.read_bytes()[16:24])
        return width, height


@contextlib.contextmanager
def drawing(inches: tuple[float, float], path: Path,
            layout: Literal["constrained"] | None = "constrained") -> "Iterator[Figure]":
    """A matplotlib figure in the report's style, saved at the end of the block; it replaces the old file atomically."""
    matplotlib = require("matplotlib", "search")
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE), replacing(path) as temporary:
        figure = Figure(figsize=inches, layout=layout)
        yield figure
        figure.savefig(temporary, format="png", metadata={"Software": None})


def plain(text: str) -> str:
    """A user's text for matplotlib, which would read what stands between two dollar signs as a formula."""
    return text.replace("$", r"\$")


# ---- learning curves


def learning_curves(findings: Findings, study: str, path: Path) -> SavedFigure | None:
    """The metric of every trial by epoch, with rungs, stopped trials and the winner; None if no trial has a score."""
    trials = [result for result in findings.ranked(study) if result.curve]
    if not trials:
        return None
    metric, winner = findings.search.metric, findings.winner(study)
    best = winner.rows[0] if winner else None
    with drawing(SMALL, path) as figure:
        axes = figure.subplots()
        for rung in findings.rungs(study):
            axes.axvline(rung, color=LIGHT, linestyle=(0, (2, 2)), linewidth=0.9, zorder=1)
        for result in trials:
            _draw_curve(axes, result, is_winner=result is best)
        for result in winner.rows[1:] if winner else []:
            axes.plot(range(1, len(result.curve) + 1), result.curve, color=BLUE, linewidth=1, linestyle=":", zorder=4)
        axes.set_ylim(*score_range(findings))
        epochs = findings.full_epochs[study]
        axes.set_xlim(1 - 0.03 * epochs, epochs + 0.03 * epochs)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{metric} on the holdout")
        axes.set_title(plain(f"study {study}"))
        _add_legend(axes, trials, winner)
    return SavedFigure(path, _describe_curves(findings, study, trials, best), f"Learning curves of study {study}.")


def _draw_curve(axes: "Axes", result: TrialResult, is_winner: bool) -> None:
    epochs = range(1, len(result.curve) + 1)
    if is_winner:
        axes.plot(epochs, result.curve, color=BLUE, linewidth=2.2, zorder=4)
    else:
        axes.plot(epochs, result.curve, color=GREY, linewidth=0.8, alpha=0.8, zorder=2)
    last = next((i for i in reversed(range(len(result.curve))) if math.isfinite(result.curve[i])), None)
    if last is None or not (result.status is TrialStatus.STOPPED or result.status.lost):
        return
    if result.status is TrialStatus.STOPPED:
        axes.plot(last + 1, result.curve[last], marker="o", markersize=3.2, color=DARK_GREY, linestyle="none", zorder=3)
    else:
        axes.plot(last + 1, result.curve[last], marker="x", markersize=5, color=ORANGE, linestyle="none", zorder=3)


def score_range(findings: Findings) -> tuple[float, float]:
    """One range of scores for all studies, without the worst hundredth, which would flatten all other curves."""
    scores = sorted(score for result in findings.results for score in result.curve if math.isfinite(score))
    cut = len(scores) // 100
    kept = scores[cut:] if findings.search.mode == "max" else scores[:len(scores) - cut]
    low, high = (kept[0], kept[-1]) if kept else (0, 1)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _add_legend(axes: "Axes", trials: list[TrialResult], winner: Finalist | None) -> None:
    from matplotlib.lines import Line2D
    handles = []
    if winner:
        handles.append(Line2D([], [], color=BLUE, linewidth=2.2, label=f"winner: trial {winner.rows[0].trial.number}"))
    if winner and len(winner.rows) > 1:
        handles.append(Line2D([], [], color=BLUE, linewidth=1, linestyle=":", label="its other seeds"))
    if any(result.status is TrialStatus.STOPPED for result in trials):
        handles.append(Line2D([], [], color=DARK_GREY, marker="o", markersize=3.2, linestyle="none", label="stopped"))
    if any(result.status.lost for result in trials):
        handles.append(Line2D([], [], color=ORANGE, marker="x", markersize=5, linestyle="none",
                              label="diverged or failed"))
    axes.legend(handles=handles, loc="best")


def _describe_curves(findings: Findings, study: str, trials: list[TrialResult], best: TrialResult | None) -> str:
    stopped = [result.epochs for result in trials if result.status is TrialStatus.STOPPED]
    parts = [f"{stopped.count(epoch)} stopped at epoch {epoch}" for epoch in sorted(set(stopped))]
    for status in (TrialStatus.FINISHED, TrialStatus.DIVERGED, TrialStatus.FAILED):
        count = sum(result.status is status for result in trials)
        parts += [f"{count} {status}"] if count else []
    end = f" The winner, trial {best.trial.number}, ends at {findings.format_score(best.score)}." if best else ""
    return (f"{findings.search.metric} on the holdout by epoch for {len(trials)} trials of study {study}: "
            f"{', '.join(parts) or 'none has ended yet'}.{end}")


# ---- score against cost


def pareto_figure(findings: Findings, cost: str, path: Path) -> SavedFigure | None:
    """Scores against a cost, with the Pareto front; None if all costs are equal or unknown."""
    points = pareto_points(findings, cost)
    if len({point.cost[cost] for point in points}) < 2:
        return None
    front = front_of(findings, points, cost)
    at = [(point.cost[cost], point.score) for point in points]
    studies = list(dict.fromkeys(point.study for point in points))
    one_cost = [study for study in studies if len({point.cost[cost] for point in points if point.study == study}) == 1]
    labels = [point.study if point.study in one_cost else f"{point.study}/{point.number}" for point in points]
    first = [next(i for i, point in enumerate(points) if point.study == study) for study in one_cost]  # its winner
    labeled = {*front, *(first if len(one_cost) <= MAX_LABELED else [])}
    with drawing(SMALL, path) as figure:
        axes = figure.subplots()
        for i, point in enumerate(points):
            on_front = i in front
            axes.errorbar(*at[i], yerr=point.spread or None, marker="o", capsize=2.5,
                          markersize=5.5 if on_front else 4.5, color=BLUE if on_front else GREY, elinewidth=1,
                          markerfacecolor=BLUE if on_front else "white", linestyle="none", zorder=3 + on_front)
        axes.step([at[i][0] for i in front], [at[i][1] for i in front], where="post", color=BLUE, linewidth=1.3,
                  zorder=2)
        if cost == "bytes":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.margins(x=0.16, y=0.16)
        axes.set_xlabel(COSTS[cost])
        axes.set_ylabel(f"{findings.search.metric} on the holdout")
        figure.draw_without_rendering()  # fixes the positions that the labels need
        _label_points(axes, at, {i: labels[i] for i in sorted(labeled)}, front)
    listed = ", ".join(f"{labels[i]} with {findings.format_score(at[i][1])} at "
                       f"{format_bytes(at[i][0]) if cost == 'bytes' else f'{at[i][0]:.3g} bits'}" for i in front)
    return SavedFigure(path, f"{findings.search.metric} against {COSTS[cost]} for {len(points)} configurations. "
                       f"On the Pareto front: {listed}.",
                       f"Score against {COSTS[cost]}. Filled points: the Pareto front. Bars: standard deviation over "
                       "seeds.")


def _label_points(axes: "Axes", at: list[tuple[float, float]], labels: dict[int, str], front: list[int]) -> None:
    """Put each label where it covers no point and no other label; omit it if there is no such place."""
    pixel = axes.figure.dpi / 72
    taken = [(x - 3 * pixel, y - 3 * pixel, x + 3 * pixel, y + 3 * pixel) for x, y in axes.transData.transform(at)]
    edges = axes.get_window_extent()
    for i in sorted(labels, key=lambda i: i not in front):
        x, y = axes.transData.transform(at[i])
        width, height = 5.1 * len(labels[i]) * pixel, 9 * pixel
        for right, up in ((6, 5), (-6, 5), (6, -12), (-6, -12), (6, 16), (-6, 16), (6, -23), (-6, -23)):
            left = x + right * pixel - (width if right < 0 else 0)
            box = (left, y + up * pixel, left + width, y + up * pixel + height)
            if box[0] >= edges.x0 and box[2] <= edges.x1 and box[1] >= edges.y0 and box[3] <= edges.y1 and not any(
                    box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                    for other in taken):
                taken.append(box)
                axes.annotate(plain(labels[i]), at[i], xytext=(right, up), textcoords="offset points", fontsize=8,
                              ha="left" if right > 0 else "right", color=INK if i in front else DARK_GREY,
                              in_layout=False)
                break


def format_bytes(count: float) -> str:
    """98304 -> 96 KiB"""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


# ---- the timeline


def timeline_figure(findings: Findings, timeline: Timeline, path: Path) -> SavedFigure | None:
    """A bar per trial from its start to its end, concurrent trials below each other; None if nothing ran."""
    if not timeline.spans or not timeline.seconds:
        return None
    statuses = {result.trial.key: result.status if result.status in BARS else TrialStatus.RUNNING
                for result in findings.results}
    spans = {status: [span for span in timeline.spans if statuses.get(span.key, TrialStatus.RUNNING) == status]
             for status in BARS}
    unit, unit_name = next((seconds, name) for seconds, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
                           if timeline.seconds > 2 * seconds or seconds == 1)
    with drawing((WIDE, 1.3 + 0.26 * min(timeline.lanes, 20)), path) as figure:
        axes = figure.subplots()
        for status, (color, hatch) in BARS.items():
            if spans[status]:
                not_ended = status is TrialStatus.RUNNING and findings.state is not SearchStatus.RUNNING
                label = "not ended" if not_ended else status
                axes.barh([span.lane + 1 for span in spans[status]],
                          [(span.end - span.begin) / unit for span in spans[status]],
                          left=[span.begin / unit for span in spans[status]], height=0.8, color=color,
                          edgecolor="white", linewidth=0.3, hatch=hatch, label=label)
        for time in timeline.interruptions:
            axes.axvline(time / unit, color=INK, linewidth=1)
        axes.invert_yaxis()
        axes.locator_params(axis="y", integer=True)
        axes.set_ylabel("trials at once")
        axes.set_xlabel(f"running time of the search in {unit_name}")
        axes.set_xlim(0, timeline.seconds / unit)
        figure.legend(loc="outside upper left", ncols=len(BARS))
    count = len(timeline.interruptions)
    lines = f" Vertical lines: interruptions ({count})." if count else ""
    return SavedFigure(path, f"Timeline of {len(timeline.spans)} trial runs over {timeline.seconds / unit:.1f} "
                       f"{unit_name}, up to {timeline.lanes} at once.{lines}",
                       f"Each bar is a trial on a machine. Concurrent trials are below each other.{lines}", wide=True)
