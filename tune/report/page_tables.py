"""The tables of the page, as cells of text; templates/macros.html turns them into HTML."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tune.report.figures import size
from tune.report.findings import Findings
from tune.report.front import COSTS, Point, front
from tune.report.importance import Importance
from tune.report.tables import short
from tune.space import Search
from tune.store.results import TrialResult

TOP = 10  # trials in a study's own table


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


def code(value: str) -> Cell:
    return Cell(value, value, code=True)


def drawn(findings: Findings, row: TrialResult) -> list[Cell]:
    """A cell for each hyperparameter."""
    values = [row.trial.drawn.get(name) for name in findings.search.space]
    return [number(value, "{:.3g}" if isinstance(value, float) else "{}")
            if isinstance(value, int | float) and not isinstance(value, bool) else Cell(short(value), str(value))
            for value in values]


def scores(findings: Findings) -> Callable[[float | None], Cell]:
    return lambda value: number(value, f"{{:.{findings.digits}f}}")


def last_score(findings: Findings, row: TrialResult) -> Cell:
    return scores(findings)(row.score if row.curve and row.status != "diverged" else None)


def winners(findings: Findings, anchors: dict[str, str]) -> Table:
    """A row per study."""
    score, rows = scores(findings), []
    for study in findings.studies:
        winner, tested = findings.winner(study.name), findings.tested(study.name)
        cost = winner.rows[0].trial.cost if winner else {}
        spent = sum(row.epochs for row in findings.own(study.name))
        rows.append([
            link(study.name, anchors[study.name]),
            number(tested and tested[0], "{:.2f}"), number(tested and tested[1], "{:.2f}"),
            score(winner and winner.mean), score(winner and winner.spread), number(winner and len(winner.scores)),
            number(cost.get("average_bits")), number(cost.get("bytes"), "{:,.0f}"),
            number(winner and winner.rows[0].trial.number), number(spent)])
    return Table(["study", "test top-1", "std. dev.", f"holdout {findings.search.metric}", "std. dev.", "seeds", "bits",
                  "bytes", "trial", "epochs spent"], rows)


def pareto_points(findings: Findings, points: list[Point]) -> Table:
    """A row per point, with the names of the fronts that it is on."""
    score, fronts = scores(findings), {}
    for cost, name in zip(COSTS, ("bits", "bytes"), strict=True):
        if all(cost in point.cost for point in points):
            fronts[name] = front([point.cost[cost] for point in points], [point.score for point in points],
                                 findings.search.mode)
    rows = []
    for i, point in enumerate(points):
        on = ", ".join(name for name, best in fronts.items() if i in best)
        packed = point.cost.get("bytes")
        rows.append([text(point.study), number(point.number), score(point.score), score(point.spread),
                     number(point.seeds), number(point.cost.get("average_bits")),
                     number(None) if packed is None else Cell(size(packed), packed, numeric=True), text(on or "–")])
    return Table(["study", "trial", findings.search.metric, "std. dev.", "seeds", "bits", "bytes", "on the front of"],
                 rows)


def importance_shares(findings: Findings, importances: dict[str, Importance], anchors: dict[str, str]) -> Table:
    """A row per study."""
    names, rows = list(findings.search.space), []
    for study, found in importances.items():
        shares = [number(found.mean[name], f"{{:.2f}} ± {found.spread[name]:.2f}") if found.mean else number(None)
                  for name in names]
        rows.append([link(study, anchors[study]), *shares,
                     number(max(0.0, 1 - sum(found.mean.values())) if found.mean else None, "{:.2f}"),
                     number(statistics.fmean(found.chance.values()) if found.chance else None, "{:.2f}"),
                     number(found.epoch or None), number(found.trials)])
    return Table(["study", *names, "interactions", "shuffled", "at epoch", "trials"], rows)


def finalists(findings: Findings, study: str) -> Table | None:
    """A row per finalist of a study, the winner first; None if none was trained with other seeds."""
    score, entries = scores(findings), findings.finalists.get(study, [])
    if all(len(finalist.scores) == 1 for finalist in entries):
        return None
    return Table(["finalist", "mean", "std. dev.", "seeds", *findings.search.space], [
        [number(finalist.rows[0].trial.number), score(finalist.mean), score(finalist.spread),
         number(len(finalist.scores)), *drawn(findings, finalist.rows[0])] for finalist in entries], marked=[0])


def best_trials(findings: Findings, study: str) -> Table:
    """A row for each of the best trials of a study."""
    return Table(["trial", findings.search.metric, "epochs", "status", *findings.search.space], [
        [number(row.trial.number), last_score(findings, row), number(row.epochs), text(findings.status(row)),
         *drawn(findings, row)] for row in findings.own(study)[:TOP]])


def sampled_space(search: Search) -> Table:
    """A row per hyperparameter."""
    return Table(["hyperparameter", "recipe key", "distribution", "values"], [
        [text(name), code(sampler.key), text(sampler.sample),
         text(", ".join(map(str, sampler.values)) if sampler.sample == "choice"
              else f"{sampler.low:g} to {sampler.high:g}")]
        for name, sampler in search.space.items()], sortable=False)


def all_trials(findings: Findings) -> Table:
    """A row per trial, repeats included."""
    won = {id(row) for entries in findings.finalists.values() for row in entries[0].rows}
    rows = [[text(row.trial.study), number(row.trial.number), number(row.trial.repeat), text(row.trial.source),
             text(findings.status(row) + (" (winner)" if id(row) in won else "")), number(row.epochs),
             last_score(findings, row), *drawn(findings, row), number(row.trial.cost.get("average_bits")),
             number(row.trial.cost.get("bytes"), "{:,.0f}"), number(row.seconds, "{:.1f}")] for row in findings.rows]
    return Table(["study", "trial", "seed", "drawn by", "status", "epochs", findings.search.metric,
                  *findings.search.space, "bits", "bytes", "seconds"], rows,
                 marked=[i for i, row in enumerate(findings.rows) if id(row) in won])
