"""The tables of the page, as cells of text; templates/macros.html turns them into HTML."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from tune.report.figures import format_bytes
from tune.report.findings import Findings
from tune.report.importance import Importance
from tune.report.leaderboard import short
from tune.report.pareto import COSTS, Point, front_of
from tune.space import Search
from tune.store.results import TrialResult
from tune.store.status import TrialStatus

MAX_TRIALS = 10  # in the table of a study


@dataclass
class Cell:
    """Text, and the value that a sorted column compares."""

    text: str
    key: float | str = ""  # "" sorts last in both directions
    numeric: bool = False
    href: str = ""
    code: bool = False


@dataclass
class Table:
    """Headings and rows of cells. The first cell of a row is its heading; marked rows are highlighted."""

    headings: list[str]
    rows: list[list[Cell]]
    marked: list[int] = field(default_factory=list)
    sortable: bool = True

    def __post_init__(self) -> None:
        self.sortable = self.sortable and len(self.rows) > 1

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all of its cells are numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [[]] * len(self.headings)
        return [all(cell.numeric for cell in column) for column in columns]


def number(value: float | None, form: str = "{:g}") -> Cell:
    return Cell("–", numeric=True) if value is None else Cell(form.format(value), value, numeric=True)


def text(value: Any) -> Cell:
    return Cell(str(value), str(value))


def link(value: str, anchor: str) -> Cell:
    return Cell(value, value, href=f"#{anchor}")


def drawn_values(findings: Findings, result: TrialResult) -> list[Cell]:
    """A cell per hyperparameter."""
    values = [result.trial.drawn.get(name) for name in findings.search.space]
    return [Cell(short(value), value, numeric=True)
            if isinstance(value, int | float) and not isinstance(value, bool) else Cell(short(value), str(value))
            for value in values]


def score(findings: Findings, value: float | None) -> Cell:
    return number(value, f"{{:.{findings.decimals}f}}")


def last_score(findings: Findings, result: TrialResult) -> Cell:
    return score(findings, result.score if result.curve and result.status is not TrialStatus.DIVERGED else None)


def winners(findings: Findings, anchors: dict[str, str]) -> Table:
    """A row per study. `anchors`: study -> id of its section."""
    rows = []
    for study in findings.studies:
        winner = findings.winner(study.name)
        accuracy, deviation, _ = findings.test_accuracy(study.name) or (None, None, 0)
        cost = winner.rows[0].trial.cost if winner else {}
        rows.append([
            link(study.name, anchors[study.name]), number(accuracy, "{:.2f}"), number(deviation, "{:.2f}"),
            score(findings, winner.mean if winner else None), score(findings, winner.spread if winner else None),
            number(len(winner.scores) if winner else None), number(cost.get("average_bits")),
            number(cost.get("bytes"), "{:,.0f}"), number(winner.rows[0].trial.number if winner else None),
            number(sum(result.epochs for result in findings.ranked(study.name)))])
    return Table(["study", "test top-1", "std. dev.", f"holdout {findings.search.metric}", "std. dev.", "seeds", "bits",
                  "bytes", "trial", "epochs spent"], rows)


def pareto_points(findings: Findings, points: list[Point]) -> Table:
    """A row per point, with the names of the Pareto fronts that it is on."""
    fronts = {name: front_of(findings, points, cost) for cost, name in zip(COSTS, ("bits", "bytes"), strict=True)
              if all(cost in point.cost for point in points)}
    rows = []
    for i, point in enumerate(points):
        packed = point.cost.get("bytes")
        rows.append([text(point.study), number(point.number), score(findings, point.score),
                     score(findings, point.spread), number(point.seeds), number(point.cost.get("average_bits")),
                     number(None) if packed is None else Cell(format_bytes(packed), packed, numeric=True),
                     text(", ".join(name for name, front in fronts.items() if i in front) or "–")])
    return Table(["study", "trial", findings.search.metric, "std. dev.", "seeds", "bits", "bytes", "on the front of"],
                 rows)


def importance_shares(findings: Findings, importances: dict[str, Importance], anchors: dict[str, str]) -> Table:
    """A row per study."""
    names, rows = list(findings.search.space), []
    for study, importance in importances.items():
        mean, spread, chance = importance.mean, importance.spread, importance.chance
        rows.append([link(study, anchors[study]),
                     *(number(mean.get(name), f"{{:.2f}} ± {spread.get(name, 0):.2f}") for name in names),
                     number(max(0.0, 1 - sum(mean.values())) if mean else None, "{:.2f}"),
                     number(statistics.fmean(chance.values()) if chance else None, "{:.2f}"),
                     number(importance.epoch or None), number(importance.trials)])
    return Table(["study", *names, "interactions", "shuffled", "at epoch", "trials"], rows)


def finalists(findings: Findings, study: str) -> Table | None:
    """A row per finalist of a study, the winner first; None if none was trained with other seeds."""
    entries = findings.finalists.get(study, [])
    if all(len(finalist.scores) == 1 for finalist in entries):
        return None
    return Table(["finalist", "mean", "std. dev.", "seeds", *findings.search.space], [
        [number(finalist.rows[0].trial.number), score(findings, finalist.mean), score(findings, finalist.spread),
         number(len(finalist.scores)), *drawn_values(findings, finalist.rows[0])] for finalist in entries], marked=[0])


def best_trials(findings: Findings, study: str) -> Table:
    """A row for each of the best trials of a study."""
    return Table(["trial", findings.search.metric, "epochs", "status", *findings.search.space], [
        [number(result.trial.number), last_score(findings, result), number(result.epochs),
         text(findings.status(result)), *drawn_values(findings, result)]
        for result in findings.ranked(study)[:MAX_TRIALS]])


def sampled_space(search: Search) -> Table:
    """A row per hyperparameter."""
    return Table(["hyperparameter", "recipe key", "distribution", "values"], [
        [text(name), Cell(sampler.key, sampler.key, code=True), text(sampler.sample),
         text(", ".join(map(str, sampler.values)) if sampler.sample == "choice"
              else f"{sampler.low:g} to {sampler.high:g}")]
        for name, sampler in search.space.items()], sortable=False)


def all_trials(findings: Findings) -> Table:
    """A row per trial, repeats included. The winners' are marked."""
    winning = {result.trial.key for entries in findings.finalists.values() for result in entries[0].rows}
    rows = [[text(result.trial.study), number(result.trial.number), number(result.trial.repeat),
             text(result.trial.source),
             text(findings.status(result) + (" (winner)" if result.trial.key in winning else "")),
             number(result.epochs), last_score(findings, result), *drawn_values(findings, result),
             number(result.trial.cost.get("average_bits")), number(result.trial.cost.get("bytes"), "{:,.0f}"),
             number(result.seconds, "{:.1f}")] for result in findings.results]
    return Table(["study", "trial", "seed", "drawn by", "status", "epochs", findings.search.metric,
                  *findings.search.space, "bits", "bytes", "seconds"], rows,
                 marked=[i for i, result in enumerate(findings.results) if result.trial.key in winning])
