"""Pictures of a search: learning curves, fronts, the timeline. Each comes with its caption and, for who cannot see it,
with what it shows in words.

One small picture per study rather than one large one of all: a page lays them out side by side on a wide screen and
below each other on a phone, and eighteen studies stay as readable as two. They share their axes.
"""

import base64
import contextlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from nulsq.errors import require
from nulsq.files import temporary_path
from tune.report.findings import Findings
from tune.report.front import COSTS, front, points
from tune.report.history import History
from tune.store.status import SearchStatus, TrialStatus

SMALL, WIDE = (4.6, 3.2), 9.0  # inches; the width of wide ones
BLUE, ORANGE, GREY, LIGHT, INK = "#0072b2", "#d55e00", "#8c8c8c", "#d9d9d9", "#262626"
STYLE = {"font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.edgecolor": "#595959", "axes.labelcolor": INK, "xtick.color": "#404040",
         "ytick.color": "#404040", "text.color": INK, "legend.frameon": False, "legend.fontsize": 8.5,
         "figure.dpi": 144, "savefig.dpi": 144, "axes.titlepad": 8}
NAMED = 12  # studies; of more only those of the front are named
ENDINGS = {TrialStatus.FINISHED: (BLUE, ""), TrialStatus.STOPPED: ("#a6cee3", ""), TrialStatus.DIVERGED: (ORANGE, "xx"),
           TrialStatus.FAILED: ("#b2182b", "//"), TrialStatus.RUNNING: (LIGHT, "")}


@dataclass
class Picture:
    path: Path
    alt: str  # what it shows, in words
    caption: str
    wide: bool = False

    @property
    def data_url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height, from the header of the PNG file."""
        return struct.unpack(">II", self.path.read_bytes()[16:24])


@contextlib.contextmanager
def drawing(inches: tuple[float, float], path: Path, layout: str | None = "constrained"):
    """A figure in the report's style, saved at the end: whoever looks sees the old picture or the new one."""
    matplotlib = require("matplotlib", "search")
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=inches, layout=layout)
        yield figure
        figure.savefig(temporary_path(path), format="png", metadata={"Software": None})
    temporary_path(path).replace(path)


# ---- learning curves


def curves(findings: Findings, study: str, path: Path) -> Picture | None:
    """Every trial's metric by epoch: rungs, where trials stopped, the winner."""
    own = [row for row in findings.own(study) if row.curve]
    if not own:
        return None
    metric, winner = findings.search.metric, findings.winner(study)
    won = winner.rows[0] if winner else None
    with drawing(SMALL, path) as figure:
        axis = figure.subplots()
        for rung in findings.rungs(study):
            axis.axvline(rung, color=LIGHT, linestyle=(0, (2, 2)), linewidth=0.9, zorder=1)
        for row in own:
            epochs = range(1, len(row.curve) + 1)
            style = {"color": BLUE, "linewidth": 2.2, "zorder": 4} if row is won else \
                {"color": GREY, "linewidth": 0.8, "alpha": 0.8, "zorder": 2}
            axis.plot(epochs, row.curve, **style)
            if row.status is TrialStatus.STOPPED or row.status.lost:
                last = next((i for i in reversed(range(len(row.curve))) if math.isfinite(row.curve[i])), None)
                if last is not None:
                    bad = row.status is not TrialStatus.STOPPED
                    axis.plot(last + 1, row.curve[last], marker="x" if bad else "o", markersize=5 if bad else 3.2,
                              color=ORANGE if bad else "#595959", linestyle="none", zorder=3)
        for row in winner.rows[1:] if winner else []:
            axis.plot(range(1, len(row.curve) + 1), row.curve, color=BLUE, linewidth=1, linestyle=":", zorder=4)
        low, high = view(findings)
        axis.set_ylim(low, high)
        most = findings.full[study]
        axis.set_xlim(1 - 0.03 * most, most + 0.03 * most)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{metric} on the holdout")
        axis.set_title(f"study {study}")
        _legend(axis, own, won, winner)
    return Picture(path, _curves_in_words(findings, study, own, won), f"Learning curves of study {study}.")


def view(findings: Findings) -> tuple[float, float]:
    """A range of scores for all studies: everything but the worst hundredth, which would flatten all the rest."""
    values = sorted(v for row in findings.rows for v in row.curve if math.isfinite(v))
    cut = len(values) // 100
    kept = values[cut:] if findings.search.mode == "max" else values[:len(values) - cut]
    low, high = (kept[0], kept[-1]) if kept else (0, 1)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _legend(axis, own, won, winner):
    from matplotlib.lines import Line2D
    shown = [Line2D([], [], color=BLUE, linewidth=2.2, label=f"winner: trial {won.trial.number}")] if won else []
    if winner and len(winner.rows) > 1:
        shown.append(Line2D([], [], color=BLUE, linewidth=1, linestyle=":", label="its other seeds"))
    if any(row.status is TrialStatus.STOPPED for row in own):
        shown.append(Line2D([], [], color="#595959", marker="o", markersize=3.2, linestyle="none", label="stopped"))
    if any(row.status.lost for row in own):
        shown.append(Line2D([], [], color=ORANGE, marker="x", markersize=5, linestyle="none",
                            label="diverged or failed"))
    axis.legend(handles=shown, loc="best")


def _curves_in_words(findings, study, own, won):
    stopped = {}
    for row in own:
        if row.status is TrialStatus.STOPPED:
            stopped[row.epochs] = stopped.get(row.epochs, 0) + 1
    parts = [f"{count} stopped at epoch {epoch}" for epoch, count in sorted(stopped.items())]
    for status, words in ((TrialStatus.FINISHED, "trained to the end"), (TrialStatus.DIVERGED, "diverged"),
                          (TrialStatus.FAILED, "failed")):
        count = sum(row.status == status for row in own)
        parts += [f"{count} {words}"] if count else []
    best = f" The winner, trial {won.trial.number}, ends at {findings.score(won.score)}." if won else ""
    return (f"{findings.search.metric} on the holdout by epoch for {len(own)} trials of study {study}: "
            f"{', '.join(parts) or 'all still under way'}.{best}")


# ---- accuracy against cost


def pareto(findings: Findings, cost: str, path: Path) -> Picture | None:
    """Scores against a cost, with the front; None where fewer than two costs are known."""
    found = points(findings, cost)
    if len({point.cost[cost] for point in found}) < 2:
        return None
    best = front([p.cost[cost] for p in found], [p.score for p in found], findings.search.mode)
    shared = {p.study for p in found if len({q.cost[cost] for q in found if q.study == p.study}) == 1}
    names = {i: p.study if p.study in shared else f"{p.study}/{p.number}" for i, p in enumerate(found)}
    named = [i for i, p in enumerate(found) if i in best or (  # beside the front, a study once: its winner
        p.study in shared and len(shared) <= NAMED and i == [q.study for q in found].index(p.study))]
    with drawing(SMALL, path) as figure:
        axis = figure.subplots()
        for i, point in enumerate(found):
            on = i in best
            axis.errorbar(point.cost[cost], point.score, yerr=point.spread or None, marker="o", capsize=2.5,
                          markersize=5.5 if on else 4.5, color=BLUE if on else GREY, elinewidth=1,
                          markerfacecolor=BLUE if on else "white", linestyle="none", zorder=3 + on)
        axis.step([found[i].cost[cost] for i in best], [found[i].score for i in best], where="post", color=BLUE,
                  linewidth=1.3, zorder=2)
        if cost == "bytes":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: size(value))
            axis.xaxis.set_minor_formatter(lambda value, _: "")
        axis.margins(x=0.16, y=0.16)
        axis.set_xlabel(COSTS[cost])
        axis.set_ylabel(f"{findings.search.metric} on the holdout")
        figure.draw_without_rendering()  # places are known from here on
        _name_points(axis, [(p.cost[cost], p.score) for p in found], {i: names[i] for i in named}, best)
    unit = size if cost == "bytes" else (lambda value: f"{value:.3g} bits")
    listed = ", ".join(f"{names[i]} with {findings.score(found[i].score)} at {unit(found[i].cost[cost])}"
                       for i in best)
    return Picture(path, f"{findings.search.metric} against {COSTS[cost]} for {len(found)} configurations. "
                   f"On the Pareto front: {listed}.",
                   f"Score against {COSTS[cost]}. Filled: the Pareto front. Bars: standard deviation over seeds.")


def _name_points(axis, at: list[tuple[float, float]], names: dict[int, str], best: list[int]) -> None:
    """Write each name where it covers neither a point nor another name; leave out the one that finds no such place."""
    pixel = axis.figure.dpi / 72
    taken = [(x - 3 * pixel, y - 3 * pixel, x + 3 * pixel, y + 3 * pixel) for x, y in axis.transData.transform(at)]
    edges = axis.get_window_extent()
    for i in sorted(names, key=lambda i: i not in best):
        x, y = axis.transData.transform(at[i])
        width, height = 5.1 * len(names[i]) * pixel, 9 * pixel
        for right, up in ((6, 5), (-6, 5), (6, -12), (-6, -12), (6, 16), (-6, 16), (6, -23), (-6, -23)):
            left = x + right * pixel - (width if right < 0 else 0)
            box = (left, y + up * pixel, left + width, y + up * pixel + height)
            if box[0] >= edges.x0 and box[2] <= edges.x1 and box[1] >= edges.y0 and box[3] <= edges.y1 and not any(
                    box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                    for other in taken):
                taken.append(box)
                axis.annotate(names[i], at[i], xytext=(right, up), textcoords="offset points", fontsize=8,
                              ha="left" if right > 0 else "right", color=INK if i in best else "#595959",
                              in_layout=False)
                break


def size(value: float) -> str:
    """98304 -> 96 KiB"""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= one:
            return f"{value / one:.3g} {unit}"
    return f"{value:.0f} B"


# ---- the timeline


def timeline(findings: Findings, past: History, path: Path) -> Picture | None:
    """Every trial as a bar from its start to its end, those that ran at once below each other."""
    if not past.spans or not past.seconds:
        return None
    status = {row.trial.key: row.status if row.status in ENDINGS else TrialStatus.RUNNING for row in findings.rows}
    unit, name = next(each for each in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
                      if past.seconds > 2 * each[0] or each[0] == 1)
    shown = sorted({status.get(span.key, TrialStatus.RUNNING) for span in past.spans}, key=list(ENDINGS).index)
    with drawing((WIDE, 1.3 + 0.26 * min(past.lanes, 20)), path) as figure:
        axis = figure.subplots()
        for ending in shown:
            color, hatch = ENDINGS[ending]
            own = [span for span in past.spans if status.get(span.key, TrialStatus.RUNNING) == ending]
            axis.barh([span.lane + 1 for span in own], [(span.end - span.begin) / unit for span in own],
                      left=[span.begin / unit for span in own], height=0.8, color=color, edgecolor="white",
                      linewidth=0.3, hatch=hatch, label=_in_words(findings, ending))
        for cut in past.breaks:
            axis.axvline(cut / unit, color=INK, linewidth=1)
        axis.invert_yaxis()
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("trials at once")
        axis.set_xlabel(f"{name} that the search ran")
        axis.set_xlim(0, past.seconds / unit)
        figure.legend(loc="outside upper left", ncols=len(shown))
    cuts = f" Vertical lines: interruptions ({len(past.breaks)})." if past.breaks else ""
    return Picture(path, f"Timeline of {len(past.spans)} trial runs over {past.seconds / unit:.1f} {name}, "
                   f"up to {past.lanes} at once.{cuts}",
                   f"Each bar is a trial on a machine, those that ran at once below each other.{cuts}", wide=True)


def _in_words(findings: Findings, ending: str) -> str:
    return "not ended" if ending is TrialStatus.RUNNING and findings.state is not SearchStatus.RUNNING else ending
