"""report/index.html: one file that opens from disk without a network, on a phone and by keyboard.

Figures are embedded (and saved next to the page, for papers), the style and the short script are inlined, and the
page's content policy forbids it to load anything. Its text is in templates/page.html, the content of its tables in
page_tables.py. Jinja escapes every value, so that the name of a study or the value of a setting cannot become markup.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulsq._version import __version__
from nulsq.errors import require
from nulsq.files import write_atomically
from nulsq.text import duration
from tune.report import page_tables
from tune.report.effort import effort
from tune.report.exports import best_path, retraining_command
from tune.report.figures import SavedFigure, format_bytes, learning_curves, pareto_figure, timeline_figure
from tune.report.findings import Findings
from tune.report.importance import Importance, importance
from tune.report.leaderboard import describe_winner
from tune.report.pareto import COSTS, pareto_points
from tune.report.responses import importance_figure, response_figure
from tune.report.timeline import Timeline, read_environments, read_timeline
from tune.space import Study
from tune.store.results import Finalist

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass
class StudyFigures:
    """The figures of a study; None if there is nothing to draw."""

    curves: SavedFigure | None = None
    responses: SavedFigure | None = None
    importance: SavedFigure | None = None


@dataclass
class Figures:
    """All figures of the page; None if there is nothing to draw."""

    studies: dict[str, StudyFigures]
    fronts: dict[str, SavedFigure | None]  # by cost
    timeline: SavedFigure | None

    @property
    def paths(self) -> list[Path]:
        figures = [figure for study in self.studies.values()
                   for figure in (study.curves, study.responses, study.importance)]
        return [figure.path for figure in (*figures, *self.fronts.values(), self.timeline) if figure is not None]


def write_page(findings: Findings, out: Path) -> list[Path]:
    """Write the figures and the page. Returns the paths, the page first."""
    out.mkdir(parents=True, exist_ok=True)
    timeline = read_timeline(findings)
    importances: dict[str, Importance] = {}
    studies: dict[str, StudyFigures] = {}
    for study in (study.name for study in findings.studies):
        comparison = findings.comparison(study)
        importances[study] = importance(findings.search.space, comparison)
        studies[study] = StudyFigures(
            learning_curves(findings, study, out / f"curves-{study}.png"),
            response_figure(findings, study, comparison, out / f"response-{study}.png"),
            importance_figure(study, importances[study], out / f"importance-{study}.png"))
    fronts = {cost: pareto_figure(findings, cost, out / f"front-{cost.replace('_', '-')}.png") for cost in COSTS}
    figures = Figures(studies, fronts, timeline_figure(findings, timeline, out / "timeline.png"))
    page = out / "index.html"
    write_atomically(page, render(findings, timeline, importances, figures))
    return [page, *figures.paths]


def render(findings: Findings, timeline: Timeline, importances: dict[str, Importance], figures: Figures) -> str:
    """The page as text."""
    jinja2 = require("jinja2", "search")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"duration": duration, "settings": format_settings, "clock": format_clock}
    anchors = {study.name: f"study-{i}" for i, study in enumerate(findings.studies)}
    image_counts = {test["test_images"] for tests in findings.tests.values() for test in tests}
    cost = next((cost for cost, figure in figures.fronts.items() if figure), None)
    return environment.get_template("page.html").render(
        findings=findings, search=findings.search, timeline=timeline, figures=figures, effort=effort(findings),
        environments=read_environments(findings), rungs=describe_rungs(findings),
        test_images=", ".join(f"{count:,}" for count in sorted(image_counts)),
        saw_holdout=sorted(study for study, tests in findings.tests.items()
                           if any(test["start_saw_holdout"] for test in tests)),
        winners=page_tables.winners(findings, anchors),
        points=page_tables.pareto_points(findings, pareto_points(findings, cost)) if cost else None,
        importances=page_tables.importance_shares(findings, importances, anchors)
        if any(importance.mean for importance in importances.values()) else None,
        studies=[StudySection(findings, study, anchors[study.name], importances[study.name],
                              figures.studies[study.name]) for study in findings.studies],
        space=page_tables.sampled_space(findings.search), all_trials=page_tables.all_trials(findings),
        css=(TEMPLATES / "page.css").read_text(), js=(TEMPLATES / "page.js").read_text(), now=time.time(),
        version=__version__)


@dataclass
class StudySection:
    """The content of a study's section."""

    findings: Findings
    study: Study
    id: str
    importance: Importance
    figures: StudyFigures

    @property
    def name(self) -> str:
        return self.study.name

    @property
    def winner(self) -> Finalist | None:
        return self.findings.winner(self.name)

    @property
    def settings(self) -> str:
        """The study's settings, and the cost of its network if all trials have the same."""
        costs = [result.trial.cost for result in self.findings.ranked(self.name)]
        parts = [format_settings(self.study.overrides) or "the recipe without changes"]
        if costs and all(cost == costs[0] for cost in costs):
            parts += [f"{costs[0]['average_bits']:g} bits on average"] if "average_bits" in costs[0] else []
            parts += [format_bytes(costs[0]["bytes"])] if "bytes" in costs[0] else []
        return "; ".join(parts)

    @property
    def outcome(self) -> str:
        outcome = describe_winner(self.findings, self.name).replace("+-", "±")
        return outcome[0].upper() + outcome[1:]

    @property
    def finalists(self) -> page_tables.Table | None:
        return page_tables.finalists(self.findings, self.name)

    @property
    def best_trials(self) -> page_tables.Table:
        return page_tables.best_trials(self.findings, self.name)

    @property
    def trials(self) -> int:
        """Number of trials without repeats."""
        return len(self.findings.ranked(self.name))

    @property
    def command(self) -> str:
        """The command that trains the winner again."""
        return retraining_command(self.findings.search, best_path(self.findings, self.name))


def format_settings(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in overrides.items())


def format_clock(seconds: float) -> str:
    """Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def describe_rungs(findings: Findings) -> str:
    """For example "1, 3 of 9", for each length of training in the search."""
    lengths = dict.fromkeys((tuple(findings.rungs(study.name)), findings.full_epochs[study.name])
                            for study in findings.studies)
    return "; ".join(f"{', '.join(map(str, rungs)) or 'none'} of {epochs}" for rungs, epochs in lengths)
