"""Files for further analysis and training, in the search's folder.

    trials.csv, .parquet     one line per trial, the same in both
    studies/STUDY/best.yaml  the winner's recipe; training it again gives the same number

A trial's metric is the one at its last epoch, best_METRIC the best of all epochs. Both are empty if there is no such
number (the trial has not begun, or diverged).
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulsq.config import Recipe, to_yaml
from nulsq.errors import require
from nulsq.files import replacing, write_atomically
from nulsq.run.directory import read_recipe
from tune.report.findings import Findings
from tune.report.leaderboard import describe_winner, format_leaderboard, mean_and_spread
from tune.space import Search
from tune.store.results import Finalist, TrialResult
from tune.store.status import TrialStatus

if TYPE_CHECKING:
    import pandas


def write_exports(findings: Findings) -> list[Path]:
    """Write these files and leaderboard.txt. Returns the paths."""
    folder = findings.folder
    csv, parquet, leaderboard = folder / "trials.csv", folder / "trials.parquet", folder / "leaderboard.txt"
    table = trial_table(findings.search, [dataclasses.replace(result, status=findings.status(result))
                                          for result in findings.results])
    write_atomically(csv, table.to_csv(index=False))
    with replacing(parquet) as temporary:
        table.to_parquet(temporary, index=False)
    write_atomically(leaderboard, format_leaderboard(findings) + "\n")
    return [csv, parquet, leaderboard, *(_write_best(findings, study, finalists[0])
                                         for study, finalists in findings.finalists.items())]


# ---- trials.csv and trials.parquet


def trial_table(search: Search, results: list[TrialResult]) -> "pandas.DataFrame":
    """One line per trial, in the order in which the trials began."""
    pandas = require("pandas", "search")
    require("pyarrow", "search")
    keys = [*(key for axis in search.studies.values() for key in axis.keys),
            *(sampler.key for sampler in search.space.values())]
    lines = [_line(search, result, keys) for result in results]
    columns = ["study", "number", "repeat", "source", "status", "epochs", search.metric, f"best_{search.metric}",
               *keys, "average_bits", "bytes", "seconds", "run"]
    table = pandas.DataFrame({name: [line[name] for line in lines] for name in columns})
    for name in (search.metric, f"best_{search.metric}", "average_bits", "bytes", "seconds"):
        table[name] = pandas.to_numeric(table[name]).astype("float64")
    for key in keys:  # a parquet column has one type: mixed and nested values become text
        values = [line[key] for line in lines]
        types = {type(value) for value in values} - {type(None)}
        if len(types) > 1 and not types <= {int, float} or types & {list, dict}:
            table[key] = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return table


def _line(search: Search, result: TrialResult, keys: list[str]) -> dict[str, Any]:
    trial, curve = result.trial, result.curve
    finite = [value for value in curve if math.isfinite(value)]
    last = curve[-1] if curve and result.status is not TrialStatus.DIVERGED and math.isfinite(curve[-1]) else None
    return {
        "study": trial.study, "number": trial.number, "repeat": trial.repeat, "source": trial.source,
        "status": str(result.status), "epochs": result.epochs, search.metric: last,
        f"best_{search.metric}": (max if search.mode == "max" else min)(finite, default=None),
        **{key: trial.overrides.get(key) for key in keys},
        "average_bits": trial.cost.get("average_bits"), "bytes": trial.cost.get("bytes"),
        "seconds": round(result.seconds, 3), "run": str(result.path),
    }


# ---- best.yaml


def _write_best(findings: Findings, study: str, winner: Finalist) -> Path:
    search, result = findings.search, winner.rows[0]
    path = best_path(findings, study)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [f"Winner of study {study} in {search.name}: trial {result.trial.number}, {search.metric} "
              f"{findings.format_score(result.score)} on the holdout after {result.epochs} epochs (this recipe, its "
              "seed)."]
    if len(winner.scores) > 1:
        header.append(f"holdout  {search.metric} {mean_and_spread(findings, winner)}")
    if findings.test_accuracy(study):
        test = findings.tests[study][0]
        header.append(f"test     {describe_winner(findings, study).removeprefix('winner' + chr(39) + 's test ')}, "
                      f"{test['checkpoint']} checkpoint (of epoch {test['epoch']} with the first seed)")
    header.append(f"run:      {retraining_command(search, path)}")
    # a newline in a name would end the comment
    text = "".join(f"# {' '.join(line.splitlines())}\n" for line in header)
    write_atomically(path, text + to_yaml(retraining_recipe(read_recipe(result.path), search, study)))
    return path


def best_path(findings: Findings, study: str) -> Path:
    return findings.folder / "studies" / study / "best.yaml"


def retraining_command(search: Search, best: Path) -> str:
    """The command that trains best.yaml, with as many ranks as the trial had."""
    ranks = f"torchrun --nproc-per-node {search.workers}" if search.workers > 1 else "python"
    return f"{ranks} -m nulsq.train {best}"


def retraining_recipe(recipe: Recipe, search: Search, study: str) -> Recipe:
    """The winner's recipe, device and threads included, with its own run directory."""
    run = dataclasses.replace(recipe.run, dir=None, train_id="best")
    return dataclasses.replace(recipe, name=f"{search.name}-{study}", run=run)
