"""index.html: one file that needs nothing else. It opens from a disk without a network, on a phone, with a keyboard.

Pictures are embedded (they also lie beside the page, for papers), style and the few lines of script are inlined, and
the page forbids itself to load anything. Order: what came out, at which cost, which hyperparameters mattered, each
study, what was run, every trial, how to read it.
"""

import statistics
import time
from pathlib import Path

from nulsq._version import __version__
from nulsq.files import write_atomically
from nulsq.text import duration
from tune.report.figures import COSTS, Picture, curves, pareto, size, timeline
from tune.report.findings import Findings
from tune.report.front import front, points
from tune.report.history import History, history, saving
from tune.report.importance import Importance, importance
from tune.report.markup import Cell, Html, document, facts, join, number, picture, table, tag
from tune.report.responses import bars, response
from tune.report.sections import listing, run_section, study_section, trials_section
from tune.report.tables import epochs_spent

MANY = 3  # studies; more of them get links of their own


def write_page(findings: Findings, out: Path) -> list[Path]:
    """The pictures and the page. Returns the paths, the page first."""
    out.mkdir(parents=True, exist_ok=True)
    past, important, drawn = history(findings), {}, {}
    for study in findings.studies:
        name, compared = study.name, findings.comparison(study.name)
        important[name] = importance(findings.search.space, compared)
        drawn[name] = {"curves": curves(findings, name, out / f"curves-{name}.png"),
                       "response": response(findings, name, compared, out / f"response-{name}.png"),
                       "importance": bars(name, important[name], out / f"importance-{name}.png")}
    fronts = {cost: pareto(findings, cost, out / f"front-{cost.replace('_', '-')}.png") for cost in COSTS}
    line = timeline(findings, past, out / "timeline.png")
    page = out / "index.html"
    write_atomically(page, _document(findings, past, important, drawn, fronts, line))
    pictures = [*(each for one in drawn.values() for each in one.values()), *fronts.values(), line]
    return [page, *(each.path for each in pictures if each is not None)]


def _document(findings, past, important, drawn, fronts, line) -> str:
    search = findings.search
    names = {study.name: f"study-{i}" for i, study in enumerate(findings.studies)}
    best = cost_section(findings, fronts)
    links = [("results", "Results"), *([("cost", "Accuracy against cost")] if best else []),
             ("hyperparameters", "Hyperparameters"), ("studies", "Studies"), ("run", "What was run"),
             ("trials", "All trials"), ("reading", "How to read this")]
    count = len(findings.studies)
    head = tag("header", tag("h1", search.name),
               tag("p", f"Hyperparameter search: {count} {'study' if count == 1 else 'studies'}, ranked by "
                   f"{search.metric} on the holdout", class_="subtitle"), notice(findings))
    menu = tag("nav", listing([tag("a", text, href=f"#{to}") for to, text in links]), aria_label="Sections")
    studies = [tag("h2", "Studies", id="studies")]
    if count > MANY:
        studies.append(tag("nav", listing([tag("a", study, href=f"#{name}") for study, name in names.items()]),
                           aria_label="Studies"))
    studies.append(tag("p", "In learning curves dotted vertical lines are rungs, at which a study’s worse trials are "
                       "stopped; scales are the same in all studies."))
    main = tag("main", results_section(findings, past, names), best, importance_section(findings, important, names),
               tag("section", *studies, *(study_section(findings, study, names[study.name], drawn[study.name],
                                                        important[study.name]) for study in findings.studies),
                   aria_labelledby="studies"),
               run_section(findings, past, line), trials_section(findings), reading_section(findings), id="main",
               tabindex=-1)
    foot = tag("footer", f"Written {time.strftime('%Y-%m-%d %H:%M')} by nulsq {__version__} from {findings.folder}; "
               "python -m tune.report writes it anew.")
    return document(f"{search.name}: results", join([tag("a", "Skip to the results", href="#main", class_="skip"), head,
                                                     menu, main, foot]))


def notice(findings: Findings) -> Html:
    if findings.state == "finished":
        return Html("")
    words = {"running": "This search is still running", "interrupted": "This search is not finished; the same command "
             "continues it"}[findings.state]
    return tag("p", tag("strong", words), f": {findings.ended} of its {len(findings.rows)} trials so far have ended. "
               "What is shown is what is known now; winners may change.", class_="notice")


# ---- what came out


def results_section(findings: Findings, past: History, names: dict[str, str]) -> Html:
    epochs, whole, _ = epochs_spent(findings)
    saved = saving(findings)
    first = [row for row in findings.rows if not row.trial.repeat]
    repeats = len(findings.rows) - len(first)
    pairs = [("trials", f"{len(first)}" + (f", and {repeats} repeats of finalists" if repeats else "")),
             ("epochs trained", f"{epochs}; {whole} without early stopping"),
             ("training time", f"{duration(saved.spent)}; about {duration(saved.whole)} without early stopping")]
    pairs += [("the search ran for", duration(past.seconds))] if past.sessions else []
    form, rows = f"{{:.{findings.digits}f}}", []
    for study in findings.studies:
        winner, tested = findings.winner(study.name), findings.tested(study.name)
        cost = winner.rows[0].trial.cost if winner else {}
        rows.append([
            Cell(tag("a", study.name, href=f"#{names[study.name]}"), study.name),
            number(tested and tested[0], "{:.2f}"), number(tested and tested[1], "{:.2f}"),
            number(winner and winner.mean, form), number(winner and winner.spread, form),
            number(winner and len(winner.scores)), number(cost.get("average_bits")),
            number(cost.get("bytes"), "{:,.0f}"), number(winner and winner.rows[0].trial.number),
            number(sum(row.epochs for row in first if row.trial.study == study.name)),
        ])
    seen = {each["test_images"] for own in findings.tests.values() for each in own}
    images = f" ({', '.join(f'{count:,}' for count in sorted(seen))} images)" if seen else ""
    shown = table("winners", f"Each study’s winner: top-1 on the test images{images}, {findings.search.metric} on the "
                  "holdout, means and standard deviations over seeds.",
                  [("study", "text"), ("test top-1", "number"), ("std. dev.", "number"),
                   (f"holdout {findings.search.metric}", "number"), ("std. dev.", "number"), ("seeds", "number"),
                   ("bits", "number"), ("bytes", "number"), ("trial", "number"), ("epochs spent", "number")], rows)
    saw = sorted(study for study, own in findings.tests.items() if any(each["start_saw_holdout"] for each in own))
    note = tag("p", f"The starting weights of {', '.join(saw)} have seen the holdout: their scores on it are too good, "
               "those on test are not.", class_="note") if saw else ""
    return tag("section", tag("h2", "Results", id="results"), facts(*pairs), shown, note, aria_labelledby="results")


def cost_section(findings: Findings, fronts: dict[str, Picture | None]) -> Html:
    if not any(fronts.values()):
        return Html("")
    rows = []
    for point in (found := points(findings, next(cost for cost, shown in fronts.items() if shown))):
        on = [{"average_bits": "bits", "bytes": "bytes"}[cost] for cost in COSTS if all(cost in p.cost for p in found)
              and found.index(point) in front([p.cost[cost] for p in found], [p.score for p in found],
                                              findings.search.mode)]
        rows.append([point.study, number(point.number), number(point.score, f"{{:.{findings.digits}f}}"),
                     number(point.spread, f"{{:.{findings.digits}f}}"), number(point.seeds),
                     number(point.cost.get("average_bits")), Cell(size(point.cost["bytes"]), point.cost["bytes"])
                     if "bytes" in point.cost else number(None), ", ".join(on) or "–"])
    shown = table("points", "The points of the pictures, and on which fronts they are: nothing cheaper is as good.",
                  [("study", "text"), ("trial", "number"), (findings.search.metric, "number"), ("std. dev.", "number"),
                   ("seeds", "number"), ("bits", "number"), ("bytes", "number"), ("on the front of", "text")], rows)
    return tag("section", tag("h2", "Accuracy against cost", id="cost"),
               tag("div", *(picture(f"front-{cost}", each) for cost, each in fronts.items()), class_="side"), shown,
               aria_labelledby="cost")


def importance_section(findings: Findings, important: dict[str, Importance], names: dict[str, str]) -> Html:
    space = list(findings.search.space)
    rows = []
    for study, found in important.items():
        cells = [Cell(join([f"{found.mean[name]:.2f}", tag("span", f" ± {found.spread[name]:.2f}")]), found.mean[name])
                 if found.mean else number(None) for name in space]
        rows.append([Cell(tag("a", study, href=f"#{names[study]}"), study), *cells,
                     number(max(0.0, 1 - sum(found.mean.values())) if found.mean else None, "{:.2f}"),
                     number(statistics.fmean(found.chance.values()) if found.chance else None, "{:.2f}"),
                     number(found.epoch or None), number(found.trials)])
    shown = table("importances", "Share of the scores’ variance that each hyperparameter explains by itself (fANOVA, "
                  "mean ± standard deviation over bootstrap samples), what is left to interactions, and the share that "
                  "a hyperparameter has on average when scores are shuffled.",
                  [("study", "text"), *((name, "number") for name in space), ("interactions", "number"),
                   ("shuffled", "number"), ("at epoch", "number"), ("trials", "number")], rows)
    why = [tag("p", f"{study}: {found.why}.", class_="note") for study, found in important.items() if found.why]
    return tag("section", tag("h2", "Hyperparameters", id="hyperparameters"),
               tag("p", "Scores are compared at the latest epoch that nearly all trials of a study reached: trials "
                   "that were stopped have no later ones. A share that is no larger than what shuffled scores give is "
                   "no finding."), shown if any(found.mean for found in important.values()) else "", *why,
               aria_labelledby="hyperparameters")


def reading_section(findings: Findings) -> Html:
    search = findings.search
    points_ = [
        f"A trial’s score is its {search.metric} on the holdout, images of the training set that are not trained on, "
        "after its last epoch. Trials rank by how long they were trained, then by score.",
        "The best of many trials is partly lucky. Where finalists were trained again with other seeds, the winner is "
        "the one with the best mean, and the standard deviation (n − 1) says what a seed alone changes.",
        "Only winners see the test images, once. Test top-1 is that of the checkpoint that was best on the holdout.",
        "Early stopping compares trials within their study only: studies never eliminate each other.",
        "What the search would have cost without early stopping is an estimate: each trial’s missing epochs at the "
        "pace of its own.",
    ]
    return tag("section", tag("h2", "How to read this", id="reading"), listing([tag("span", each) for each in points_]),
               aria_labelledby="reading")
