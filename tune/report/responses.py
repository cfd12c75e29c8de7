"""Pictures of what hyperparameters do: the score against each, against pairs of them, and fANOVA's importances.

All at a study's common epoch, which nearly all trials reached: later scores exist only for trials that earlier ones
selected. How far a trial got afterwards is its marker.
"""

import itertools
import math
from pathlib import Path

from tune.report.figures import BLUE, GREY, INK, LIGHT, ORANGE, SMALL, WIDE, Picture, drawing
from tune.report.findings import Comparison, Findings
from tune.report.importance import Importance
from tune.space import Sampler

ACROSS = 3
PAIRS = 6  # at most
HEAD, ROW = 0.5, 2.55  # inches
# how far a trial got: from the first rung to the end. Colour, form and size say the same thing.
STEPS = [("#bdbdbd", "o", 16), ("#9ecae1", "s", 18), ("#4292c6", "D", 20), ("#08519c", "^", 30), ("#08306b", "P", 40),
         ("#000000", "*", 60)]


def response(findings: Findings, study: str, found: Comparison | None, path: Path) -> Picture | None:
    """The score against each hyperparameter, and against pairs of them; None where there is nothing to compare."""
    space = findings.search.space
    if found is None or not space:
        return None
    pairs = list(itertools.combinations(space, 2))[:PAIRS]
    above, below = -(-len(space) // ACROSS), -(-len(pairs) // ACROSS)
    rows, height = above + below, HEAD + (above + below) * ROW
    # A grid by hand: finding one that fits would take longer than the drawing.
    with drawing((WIDE, height), path, layout=None) as figure:
        grid = figure.subplots(rows, ACROSS, squeeze=False, gridspec_kw={
            "left": 0.075, "right": 0.895, "top": 1 - HEAD / height, "bottom": 0.5 / height, "wspace": 0.42,
            "hspace": 0.42})
        singles, doubles = list(grid[:above].flat), list(grid[above:].flat)
        steps = _how_far(findings, study, found)
        for axis, name in zip(singles, space, strict=False):
            _single(axis, space[name], name, found, steps)
        for axis in singles[::ACROSS]:
            axis.set_ylabel(f"{findings.search.metric} at epoch {found.epoch}")
        shades = None
        for axis, (x, y) in zip(doubles, pairs, strict=False):
            shades = _pair(axis, space, x, y, found)
        for axis in (*singles[len(space):], *doubles[len(pairs):]):
            axis.axis("off")
        if shades is not None:
            bar = figure.add_axes([0.92, 0.5 / height, 0.014, (below * ROW - 0.75) / height])
            figure.colorbar(shades, cax=bar, label=f"{findings.search.metric} at epoch {found.epoch}")
        figure.legend(handles=_markers(steps, found), loc="upper left", bbox_to_anchor=(0.06, 1 - 0.1 / height),
                      ncols=7)
    best = max(range(len(found)), key=lambda i: found.scores[i] * (1 if findings.search.mode == "max" else -1))
    at = ", ".join(f"{name} {_text(found.rows[best].trial.drawn[name])}" for name in space)
    return Picture(path, f"{findings.search.metric} of {len(found)} trials of study {study} at epoch {found.epoch}, "
                   f"against {', '.join(space)} and against pairs of them. The best there, "
                   f"{findings.score(found.scores[best])}, was drawn at {at}.",
                   f"Response of study {study} at epoch {found.epoch}, which nearly all trials reached. Above: against "
                   "each hyperparameter, markers by how far the trial got. Below: pairs, coloured by score.", wide=True)


def _how_far(findings, study, found):
    """A marker for each trial: 0 for the first rung, up to the last of STEPS for the end. Also their names."""
    ends = [*findings.rungs(study), findings.full[study]]
    reached = [sum(row.epochs > end for end in ends[:-1]) for row in found.rows]
    if len(ends) == 1:
        return dict.fromkeys(range(len(reached)), (STEPS[3], f"trained to epoch {ends[0]}"))
    scale = (len(STEPS) - 1) / (len(ends) - 1)
    return {i: (STEPS[round(step * scale)], f"up to epoch {ends[step]}") for i, step in enumerate(reached)}


def _single(axis, sampler: Sampler, name: str, found: Comparison, steps) -> None:
    at = [place(sampler, row.trial.drawn[name], row.trial.number) for row in found.rows]
    for (color, marker, area), _ in sorted(set(steps.values()), key=lambda each: each[0][2]):
        own = [i for i in steps if steps[i][0][1] == marker and not found.imputed[i]]
        axis.scatter([at[i] for i in own], [found.scores[i] for i in own], color=color, marker=marker, s=area,
                     edgecolor="#404040", linewidth=0.4, zorder=2 + area / 100)
    lost = [i for i in steps if found.imputed[i]]
    axis.scatter([at[i] for i in lost], [found.scores[i] for i in lost], color=ORANGE, marker="x", s=26, linewidth=1.2)
    scale(axis.xaxis, sampler)
    axis.set_xlabel(name)
    axis.grid(axis="y", color="#ececec", linewidth=0.7)
    axis.set_axisbelow(True)


def _pair(axis, space, x: str, y: str, found: Comparison):
    known = sorted(score for score, imputed in zip(found.scores, found.imputed, strict=True) if not imputed)
    low, high = known[len(known) // 20], known[-1 - len(known) // 20]  # a few outliers would leave one colour to all
    at = [(place(space[x], row.trial.drawn[x], row.trial.number), place(space[y], row.trial.drawn[y],
           row.trial.number + 1)) for row in found.rows]
    kept = [i for i in range(len(found)) if not found.imputed[i]]
    shades = axis.scatter([at[i][0] for i in kept], [at[i][1] for i in kept], c=[found.scores[i] for i in kept],
                          cmap="viridis", vmin=low, vmax=high, s=30, edgecolor="#404040", linewidth=0.4)
    lost = [i for i in range(len(found)) if found.imputed[i]]
    axis.scatter([at[i][0] for i in lost], [at[i][1] for i in lost], color=ORANGE, marker="x", s=26, linewidth=1.2)
    scale(axis.xaxis, space[x])
    scale(axis.yaxis, space[y])
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    return shades


def place(sampler: Sampler, value, number: int) -> float:
    """Where a drawn value stands on its axis; values of a choice beside each other, each trial's a little aside."""
    if sampler.sample == "choice":
        return sampler.values.index(value) + 0.3 * ((number * 0.618) % 1 - 0.5)
    return value


def scale(axis, sampler: Sampler) -> None:
    """The sampler's own scale and range, on one of the two axes of a panel."""
    x = axis.axis_name == "x"
    if sampler.sample == "choice":
        low, high = -0.5, len(sampler.values) - 0.5
        axis.set_ticks(range(len(sampler.values)), [str(value)[:12] for value in sampler.values])
    elif sampler.sample == "loguniform":
        (axis.axes.set_xscale if x else axis.axes.set_yscale)("log")
        margin = (sampler.high / sampler.low) ** 0.04
        low, high = sampler.low / margin, sampler.high * margin
    else:
        margin = 0.04 * (sampler.high - sampler.low)
        low, high = sampler.low - margin, sampler.high + margin
    (axis.axes.set_xlim if x else axis.axes.set_ylim)(low, high)


def _markers(steps, found):
    from matplotlib.lines import Line2D
    names = dict(sorted({name: style for style, name in steps.values()}.items(), key=lambda each: int(
        each[0].rpartition(" ")[2])))
    shown = [Line2D([], [], color=color, marker=marker, markersize=math.sqrt(area), linestyle="none",
                    markeredgecolor="#404040", markeredgewidth=0.4, label=name)
             for name, (color, marker, area) in names.items()]
    if any(found.imputed):
        shown.append(Line2D([], [], color=ORANGE, marker="x", markersize=5, linestyle="none", label="diverged before"))
    return shown


def bars(study: str, found: Importance, path: Path) -> Picture | None:
    """Importances with their uncertainty, and what chance would show; None where there are none."""
    if found.why:
        return None
    names = sorted(found.mean, key=found.mean.get)
    with drawing((SMALL[0], 1.15 + 0.36 * len(names)), path) as figure:
        axis = figure.subplots()
        axis.barh(names, [found.mean[name] for name in names], color=BLUE, height=0.55, zorder=2)
        axis.errorbar([found.mean[name] for name in names], range(len(names)),
                      xerr=[found.spread[name] for name in names], linestyle="none", color=INK, capsize=3,
                      elinewidth=1.1, zorder=3)
        if found.chance:
            axis.plot([found.chance[name] for name in names], range(len(names)), marker="|", markersize=15,
                      markeredgewidth=2, color=ORANGE, linestyle="none", zorder=4, label="shuffled scores")
            axis.legend(loc="lower right", bbox_to_anchor=(1, 0.98), markerscale=0.5, borderpad=0)
        axis.set_xlim(0, 1.02)
        axis.set_xlabel(f"share of the variance at epoch {found.epoch}")
        axis.set_title(f"study {study}")
        axis.grid(axis="x", color=LIGHT, linewidth=0.6)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_color(GREY)
    listed = ", ".join(f"{name} {found.mean[name]:.2f} plus or minus {found.spread[name]:.2f}"
                       + (f" (shuffled {found.chance[name]:.2f})" if found.chance else "") for name in reversed(names))
    return Picture(path, f"Importance of each hyperparameter for study {study} at epoch {found.epoch}: {listed}.",
                   f"Importance in study {study}: fANOVA over {found.trials} trials, mean and standard deviation over "
                   "bootstrap samples.")


def _text(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
