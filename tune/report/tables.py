"""What a search leaves for people's own analysis and for the next training.

    leaderboard.txt          a table per study on the holdout; its winner on test
    trials.csv, .parquet     a line per trial, the same in both
    studies/STUDY/best.yaml  the winner's own recipe: retraining it gives the same number

In the tables a trial's metric is the one at its last epoch and best_METRIC the best of all epochs; both are empty
where there is no such number (not begun, diverged).
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from nulsq.config import Recipe, to_yaml
from nulsq.errors import require
from nulsq.files import temporary_path, write_atomically
from nulsq.run.directory import read_recipe
from tune.report.findings import Findings
from tune.space import Search
from tune.store.results import Finalist, TrialResult
from tune.store.status import TrialStatus


def write_tables(findings: Findings) -> list[Path]:
    """All of the above, into the search's folder. Returns the paths."""
    folder = findings.folder
    table = frame(findings.search, [dataclasses.replace(row, status=findings.status(row)) for row in findings.rows])
    made = [folder / "trials.csv", folder / "trials.parquet", folder / "leaderboard.txt"]
    write_atomically(made[0], table.to_csv(index=False))
    table.to_parquet(temporary_path(made[1]), index=False)
    temporary_path(made[1]).replace(made[1])
    write_atomically(made[2], _leaderboard(findings) + "\n")
    return made + [_write_best(findings, study, own[0]) for study, own in findings.finalists.items()]


# ---- a line per trial


def frame(search: Search, rows: list[TrialResult]):
    """The trials as a pandas.DataFrame, in the order in which they were begun."""
    pandas = require("pandas", "search")
    require("pyarrow", "search")
    keys = [*(key for axis in search.studies.values() for key in axis.keys),
            *(sampler.key for sampler in search.space.values())]
    lines = [_line(search, row, keys) for row in rows]
    names = ["study", "number", "repeat", "source", "status", "epochs", search.metric, f"best_{search.metric}", *keys,
             "average_bits", "bytes", "seconds", "run"]
    table = pandas.DataFrame({name: [line[name] for line in lines] for name in names})
    for name in (search.metric, f"best_{search.metric}", "average_bits", "bytes", "seconds"):
        table[name] = pandas.to_numeric(table[name]).astype("float64")
    for key in keys:  # a column has one type in parquet: what is mixed or nested is text
        values = [line[key] for line in lines]
        kinds = {type(value) for value in values} - {type(None)}
        if len(kinds) > 1 and not kinds <= {int, float} or kinds & {list, dict}:
            table[key] = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return table


def _line(search: Search, row: TrialResult, keys: list[str]) -> dict[str, Any]:
    trial = row.trial
    known = [value for value in row.curve if math.isfinite(value)]
    scored = row.curve and row.status is not TrialStatus.DIVERGED and math.isfinite(row.curve[-1])
    last = row.curve[-1] if scored else None
    return {
        "study": trial.study, "number": trial.number, "repeat": trial.repeat, "source": trial.source,
        "status": row.status, "epochs": row.epochs, search.metric: last,
        f"best_{search.metric}": (max if search.mode == "max" else min)(known, default=None),
        **{key: trial.overrides.get(key) for key in keys},
        "average_bits": trial.cost.get("average_bits"), "bytes": trial.cost.get("bytes"),
        "seconds": round(row.seconds, 3), "run": str(row.path),
    }


# ---- the leaderboard


def leaderboard(search: Search, rows: list[TrialResult], tests: dict[str, list[dict[str, Any]]], top: int = 5) -> str:
    """A table per study: its winner on test, the best trials on the holdout, the finalists' means."""
    return _leaderboard(Findings(search, rows, tests), top)


def _leaderboard(findings: Findings, top: int = 5) -> str:
    search, lines = findings.search, []
    names = list(search.space)
    header = ["trial", search.metric, "epochs", "status", *names]
    for study in findings.studies:
        own = findings.own(study.name)
        lines.append(f"study {study.name}: {verdict(findings, study.name)}")
        table = [[f"{row.trial.number}", findings.score(row.score) if row.curve else "-", str(row.epochs),
                  findings.status(row), *(short(row.trial.drawn.get(name)) for name in names)] for row in own[:top]]
        widths = [max(len(cells[i]) for cells in [header, *table]) for i in range(len(header))]
        lines += ["  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
                  for cells in [header, *table]]
        if len(own) > top:
            lines.append(f"  ({len(own) - top} more in trials.csv)")
        lines += [f"  finalist {each.rows[0].trial.number}: {search.metric} {mean_and_spread(findings, each)}"
                  for each in findings.finalists.get(study.name, []) if len(each.scores) > 1]
        lines.append("")
    return "\n".join([*lines, spent(findings)])


def verdict(findings: Findings, study: str) -> str:
    """What the study's winner reached on the test images, in words."""
    if findings.winner(study) is None:
        return "no trial has reached its end"
    tested = findings.tested(study)
    if tested is None:
        return "winner not evaluated on test"
    mean, spread, seeds = tested
    first = findings.tests[study][0]
    saw = "; its starting weights have seen the holdout" if first["start_saw_holdout"] else ""
    many = f" +- {spread:.2f}" if spread is not None else ""
    count = f"{seeds} seeds, " if seeds > 1 else ""
    return f"winner's test top-1 {mean:.2f}{many} ({count}{first['test_images']} images{saw})"


def mean_and_spread(findings: Findings, finalist: Finalist, sign: str = "+-") -> str:
    """As in "96.10 +- 0.12 (3 seeds)"."""
    mean, count = findings.score(finalist.mean), len(finalist.scores)
    if finalist.spread is None:
        return f"{mean} (1 seed)"
    return f"{mean} {sign} {findings.score(finalist.spread)} ({count} seeds)"


def epochs_spent(findings: Findings) -> tuple[int, int, int]:
    """Epochs trained; what all trials would have been to their end; epochs of repeats. A trial that diverged has come
    to its end."""
    first = [row for row in findings.rows if not row.trial.repeat]
    whole = sum(row.epochs if row.status is TrialStatus.DIVERGED else findings.full[row.trial.study] for row in first)
    return sum(row.epochs for row in first), whole, sum(row.epochs for row in findings.rows if row.trial.repeat)


def spent(findings: Findings) -> str:
    trained, whole, again = epochs_spent(findings)
    return (f"{trained} epochs trained; all trials to their end would have been {whole}"
            + (f"; {again} more for the finalists' other seeds" if again else ""))


def short(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


# ---- best.yaml


def _write_best(findings: Findings, study: str, winner: Finalist) -> Path:
    search, row = findings.search, winner.rows[0]
    path = findings.folder / "studies" / study / "best.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [f"Winner of study {study} in {search.name}: trial {row.trial.number}, {search.metric} "
              f"{findings.score(row.score)} on the holdout after {row.epochs} epochs (this recipe, its seed)."]
    if len(winner.scores) > 1:
        header.append(f"holdout  {search.metric} {mean_and_spread(findings, winner)}")
    if findings.tested(study):
        first = findings.tests[study][0]
        header.append(f"test     {verdict(findings, study).removeprefix('winner' + chr(39) + 's test ')}, "
                      f"{first['checkpoint']} checkpoint, the first seed's of epoch {first['epoch']}")
    header.append(f"run:      {retraining_command(search, path)}")
    # newlines in a name would end the comment
    text = "".join(f"# {' '.join(line.splitlines())}\n" for line in header)
    write_atomically(path, text + to_yaml(retraining_recipe(read_recipe(row.path), search, study)))
    return path


def retraining_command(search: Search, best: Path) -> str:
    """With as many ranks as the trial had."""
    ranks = f"torchrun --nproc-per-node {search.workers}" if search.workers > 1 else "python"
    return f"{ranks} -m nulsq.train {best}"


def retraining_recipe(recipe: Recipe, search: Search, study: str) -> Recipe:
    """The winner's recipe, device and threads included, with a run directory of its own."""
    run = dataclasses.replace(recipe.run, dir=None, train_id="best")
    return dataclasses.replace(recipe, name=f"{search.name}-{study}", run=run)
