"""From the trials' run directories to trials.csv, leaderboards, each study's best.yaml, and a plot."""

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nulsq.config import Recipe, to_yaml
from nulsq.errors import require
from nulsq.evaluate import evaluate_run, read_evaluation
from nulsq.run_directory import read_metrics, read_outcome, read_recipe, write_atomically
from nulsq.world import World
from tune.space import Search, Trial, base_recipe, rungs, studies
from tune.trial import WORST, directory


@dataclass
class Row:
    """What became of one trial."""

    trial: Trial
    status: str  # finished, stopped (by ASHA), diverged, failed, not started
    epochs: int
    score: float  # the metric at the last epoch; the worst value where that is no number
    curve: list[float]
    path: Path


def collect(search: Search, trials: list[Trial]) -> list[Row]:
    """Read every trial's run directory."""
    rungs_file = search.directory / "rungs"
    stopped = json.loads(rungs_file.read_text())["stopped"] if rungs_file.is_file() else {}
    rows = []
    for trial in trials:
        path = directory(search.directory, trial.study, trial.number)
        metrics = read_metrics(path)
        status = read_outcome(path)["outcome"] if path.is_dir() else "not started"
        if status in ("running", "saved"):  # ended from outside: by ASHA, or its process died
            status = "stopped" if trial.key in stopped else "failed"
        curve = [line[search.metric] for line in metrics]
        score = curve[-1] if curve and math.isfinite(curve[-1]) and status != "diverged" else WORST[search.metric]
        rows.append(Row(trial, status, metrics[-1]["epoch"] if metrics else 0, score, curve, path))
    return rows


def ranked(rows: list[Row], study: str, mode: str) -> list[Row]:
    """A study's trials, best first: longest trained, then better score. What diverged or failed comes last."""
    sign = 1 if mode == "max" else -1
    own = [row for row in rows if row.trial.study == study]
    return sorted(own, key=lambda row: (row.status not in ("finished", "stopped"), -row.epochs, -sign * row.score))


def winners(search: Search, rows: list[Row]) -> dict[str, Row]:
    """Study -> its best trial; studies in which nothing was trained are left out."""
    found = {}
    for study in studies(search):
        best = ranked(rows, study.name, search.mode)[:1]
        if best and best[0].status in ("finished", "stopped"):
            found[study.name] = best[0]
    return found


def evaluate_winners(winners: dict[str, Row]) -> dict[str, dict]:
    """Each winner once on the test images; what an earlier call found is not measured again."""
    here = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {study: read_evaluation(row.path) or evaluate_run(row.path, here=here) for study, row in winners.items()}


def write(search: Search, rows: list[Row], tests: dict[str, dict]) -> list[Path]:
    """trials.csv, leaderboard.txt, search.png and studies/STUDY/best.yaml. Returns the paths."""
    folder = search.directory
    best = winners(search, rows)
    made = [_write_csv(folder / "trials.csv", search, rows)]
    write_atomically(folder / "leaderboard.txt", leaderboard(search, rows, tests) + "\n")
    made.append(folder / "leaderboard.txt")
    made.append(_plot(folder / "search.png", search, rows, best))
    for study, row in best.items():
        path = folder / "studies" / study / "best.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = tests[study]
        header = (f"# Winner of study {study} in {search.name}: trial {row.trial.number}, {search.metric} "
                  f"{row.score:.2f} on the holdout after {row.epochs} epochs.\n"
                  f"# test top-1 {found['test_top1']:.2f} ({found['test_images']} images, "
                  f"{found['checkpoint']} checkpoint of epoch {found['epoch']})\n"
                  f"# run:      python -m nulsq.train {path}\n")
        path.write_text(header + to_yaml(retraining_recipe(read_recipe(row.path), search, study)))
        made.append(path)
    return made


def retraining_recipe(recipe: Recipe, search: Search, study: str) -> Recipe:
    """The winner's recipe with a run directory of its own."""
    run = dataclasses.replace(recipe.run, dir=None, train_id="best")
    return dataclasses.replace(recipe, name=f"{search.name}-{study}", run=run)


def leaderboard(search: Search, rows: list[Row], tests: dict[str, dict], top: int = 5) -> str:
    """A table per study: the best trials on the holdout, and the winner on test."""
    lines = []
    names = list(search.space)
    for study in studies(search):
        own = ranked(rows, study.name, search.mode)
        if tests.get(study.name):
            test = tests[study.name]
            saw = "; its starting weights have seen the holdout" if test["start_saw_holdout"] else ""
            lines.append(f"study {study.name}: winner's test top-1 {test['test_top1']:.2f} "
                         f"({test['test_images']} images{saw})")
        else:
            lines.append(f"study {study.name}: no trial finished an epoch")
        header = ["trial", search.metric, "epochs", "status", *names]
        table = [[f"{row.trial.number}", f"{row.score:.2f}" if row.curve else "-", str(row.epochs), row.status,
                  *(_short(row.trial.drawn[name]) for name in names)] for row in own[:top]]
        widths = [max(len(cells[i]) for cells in [header, *table]) for i in range(len(header))]
        lines += ["  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
                  for cells in [header, *table]]
        if len(own) > top:
            lines.append(f"  ({len(own) - top} more in trials.csv)")
        lines.append("")
    spent = sum(row.epochs for row in rows)
    lines.append(f"{spent} epochs trained; all trials to their end would have been "
                 f"{sum(search.trials * epochs for epochs in _full_epochs(search).values())}")
    return "\n".join(lines)


def _full_epochs(search: Search) -> dict[str, int]:
    return {study.name: base_recipe(search, study.overrides).optim.epochs for study in studies(search)}


def _write_csv(path: Path, search: Search, rows: list[Row]) -> Path:
    grid = [axis.key for axis in search.studies.values()]
    sampled = [sampler.key for sampler in search.space.values()]
    aside = path.with_name(f".{path.name}.unfinished")
    with aside.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study", "number", "status", "epochs", search.metric, f"best_{search.metric}",
                        *grid, *sampled, "run"])
        for row in rows:
            best = (max if search.mode == "max" else min)(row.curve, default="")
            table.writerow([row.trial.study, row.trial.number, row.status, row.epochs,
                            row.score if row.curve else "", best,
                            *(row.trial.overrides[key] for key in grid + sampled), row.path])
    aside.replace(path)
    return path


def _plot(path: Path, search: Search, rows: list[Row], best: dict[str, Row]) -> Path:
    """Learning curves of every study beside each other: where each trial stopped, and the winner."""
    matplotlib = require("matplotlib", "search")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells, most = studies(search), _full_epochs(search)
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), sharey=True, squeeze=False)
    for axis, study in zip(axes.flat, cells, strict=False):
        own = [row for row in rows if row.trial.study == study.name and row.curve]
        for row in own:
            won = row is best.get(study.name)
            epochs = range(1, len(row.curve) + 1)
            axis.plot(epochs, row.curve, color="tab:blue" if won else "0.6", linewidth=2.2 if won else 1,
                      zorder=3 if won else 2, label="winner" if won else None)
            if row.status != "finished":
                axis.plot(len(row.curve), row.curve[-1], marker="o" if row.status == "stopped" else "x", color="0.4",
                          markersize=4, zorder=2)
        for rung in rungs(most[study.name], search.grace, search.reduction):
            axis.axvline(rung, color="0.85", linestyle=":", zorder=1)
        axis.set_title(study.name, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if study.name in best:
            axis.legend(loc="lower right", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{search.metric} on the holdout")
    for axis in axes.flat[len(cells):]:
        axis.axis("off")
    figure.suptitle(f"{search.name}: dots are trials that ASHA stopped, dotted lines its rungs", fontsize=11)
    figure.tight_layout()
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=110)
    pyplot.close(figure)
    aside.replace(path)
    return path


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
