"""index.html: one file that needs nothing else. It opens from a disk without a network, on a phone, with a keyboard.

Pictures are embedded (they also lie beside the page, for papers), style and the few lines of script are inlined, and
the page forbids itself to load anything. What it says is in templates/page.html, what its tables hold in
page_tables.py. Jinja escapes every value, so no name of a study or value of a setting can become part of the page.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulsq._version import __version__
from nulsq.errors import require
from nulsq.files import write_atomically
from nulsq.text import duration
from tune.report import page_tables
from tune.report.figures import COSTS, Picture, curves, pareto, size, timeline
from tune.report.findings import Findings
from tune.report.front import points
from tune.report.history import History, history, places, saving
from tune.report.importance import Importance, importance
from tune.report.responses import bars, response
from tune.report.tables import epochs_spent, retraining_command, verdict
from tune.space import Study

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass
class Figures:
    """What is drawn; None where there is nothing to draw."""

    studies: dict[str, dict[str, Picture | None]]  # study -> curves, response, importance
    fronts: dict[str, Picture | None]  # by cost
    timeline: Picture | None

    @property
    def paths(self) -> list[Path]:
        drawn = [*(figure for own in self.studies.values() for figure in own.values()), *self.fronts.values(),
                 self.timeline]
        return [figure.path for figure in drawn if figure is not None]


def write_page(findings: Findings, out: Path) -> list[Path]:
    """The pictures and the page. Returns the paths, the page first."""
    out.mkdir(parents=True, exist_ok=True)
    past, importances, drawn = history(findings), {}, {}
    for study in findings.studies:
        name, compared = study.name, findings.comparison(study.name)
        importances[name] = importance(findings.search.space, compared)
        drawn[name] = {"curves": curves(findings, name, out / f"curves-{name}.png"),
                       "response": response(findings, name, compared, out / f"response-{name}.png"),
                       "importance": bars(name, importances[name], out / f"importance-{name}.png")}
    fronts = {cost: pareto(findings, cost, out / f"front-{cost.replace('_', '-')}.png") for cost in COSTS}
    figures = Figures(drawn, fronts, timeline(findings, past, out / "timeline.png"))
    page = out / "index.html"
    write_atomically(page, render(findings, past, importances, figures))
    return [page, *figures.paths]


def render(findings: Findings, past: History, importances: dict[str, Importance], figures: Figures) -> str:
    """The page as text."""
    jinja2 = require("jinja2", "search")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"duration": duration, "settings": settings, "clock": lambda seconds: time.strftime(
        "%Y-%m-%d %H:%M", time.localtime(seconds))}
    anchors = {study.name: f"study-{i}" for i, study in enumerate(findings.studies)}
    first = [row for row in findings.rows if not row.trial.repeat]
    seen = {test["test_images"] for tests in findings.tests.values() for test in tests}
    cost = next((cost for cost, shown in figures.fronts.items() if shown), None)
    return environment.get_template("page.html").render(
        findings=findings, search=findings.search, history=past, figures=figures, saving=saving(findings),
        places=places(findings), epochs=dict(zip(("trained", "whole", "repeats"), epochs_spent(findings), strict=True)),
        trials=len(first), repeats=len(findings.rows) - len(first), rungs=_rungs(findings),
        test_images=", ".join(f"{count:,}" for count in sorted(seen)),
        seen_holdout=", ".join(sorted(study for study, tests in findings.tests.items()
                                      if any(test["start_saw_holdout"] for test in tests))),
        winners=page_tables.winners(findings, anchors),
        points=page_tables.pareto_points(findings, points(findings, cost)) if cost else None,
        importances=page_tables.importance_shares(findings, importances, anchors)
        if any(found.mean for found in importances.values()) else None,
        studies=[_study(findings, study, anchors[study.name], importances[study.name], figures.studies[study.name])
                 for study in findings.studies],
        space=page_tables.sampled_space(findings.search), all_trials=page_tables.all_trials(findings),
        css=(TEMPLATES / "page.css").read_text(), js=(TEMPLATES / "page.js").read_text(), now=time.time(),
        version=__version__)


def _study(findings: Findings, study: Study, anchor: str, importance: Importance,
           figures: dict[str, Picture | None]) -> dict[str, Any]:
    """What the page says about a study."""
    name, winner = study.name, findings.winner(study.name)
    costs = [row.trial.cost for row in findings.own(name)]
    described = [settings(study.overrides) or "the recipe as it is"]
    if costs and all(cost == costs[0] for cost in costs):  # otherwise each trial has its own
        described += [f"{costs[0]['average_bits']:g} bits on average"] if "average_bits" in costs[0] else []
        described += [size(costs[0]["bytes"])] if "bytes" in costs[0] else []
    reached = verdict(findings, name).replace("+-", "±")
    return {
        "name": name, "id": anchor, "settings": "; ".join(described), "verdict": reached[0].upper() + reached[1:],
        "finalists": page_tables.finalists(findings, name), "trials": page_tables.best_trials(findings, name),
        "count": len(costs), "importance": importance, "figures": figures, "winner": winner and winner.rows[0].trial,
        "command": retraining_command(findings.search, findings.folder / "studies" / name / "best.yaml"),
    }


def settings(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in overrides.items())


def _rungs(findings: Findings) -> str:
    found = {json.dumps(findings.rungs(study.name)): (findings.rungs(study.name), findings.full[study.name])
             for study in findings.studies}
    return "; ".join(f"{', '.join(map(str, steps)) or 'none'} of {most}" for steps, most in found.values())
