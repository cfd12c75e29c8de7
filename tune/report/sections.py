"""The larger sections of the page: a study, what was run, all trials. Each takes the findings and returns markup."""

import json
import time

from nulsq.text import duration
from tune.report.figures import Picture, size
from tune.report.findings import Findings
from tune.report.history import History, places, saving
from tune.report.importance import Importance
from tune.report.markup import Cell, Html, facts, join, number, picture, table, tag
from tune.report.tables import epochs_spent, retraining_command, short, verdict
from tune.space import Sampler, Study
from tune.store.results import TrialResult

TOP = 10  # trials in a study's own table


def hyperparameters(findings: Findings, row: TrialResult) -> list[Cell]:
    found = []
    for name in findings.search.space:
        value = row.trial.drawn.get(name)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        found.append(Cell(short(value), value if plain else str(value)))
    return found


def columns_of(findings: Findings) -> list[tuple[str, str]]:
    """The hyperparameters' columns."""
    def numeric(sampler: Sampler) -> bool:
        return sampler.sample != "choice" or all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in sampler.values)
    return [(name, "number" if numeric(sampler) else "text") for name, sampler in findings.search.space.items()]


def trained(findings: Findings, row: TrialResult) -> Cell:
    score = row.score if row.curve and row.status != "diverged" else None
    return number(score, f"{{:.{findings.digits}f}}")


# ---- a study


def study_section(findings: Findings, study: Study, name: str, pictures: dict[str, Picture | None],
                  found: Importance) -> Html:
    search, own = findings.search, findings.own(study.name)
    settings = ", ".join(f"{key} = {value}" for key, value in study.overrides.items())
    first = own[0].trial.cost if own else {}
    costs = [f"{first['average_bits']:g} bits on average"] if "average_bits" in first else []
    costs += [size(first["bytes"])] if "bytes" in first else []
    if len({str(row.trial.cost) for row in own}) > 1:
        costs = []  # each trial has its own
    says = verdict(findings, study.name).replace("+-", "±")
    parts = [tag("h3", f"Study {study.name}", id=name),
             tag("p", "; ".join([settings or "the recipe as it is", *costs]), ". ", says[:1].upper() + says[1:], ".")]
    finalists = findings.finalists.get(study.name, [])
    if any(len(each.scores) > 1 for each in finalists):
        parts.append(table(
            f"{name}-finalists", "Finalists, trained again with other seeds; the winner has the best mean.",
            [("finalist", "number"), ("mean", "number"), ("std. dev.", "number"), ("seeds", "number"),
             *columns_of(findings)],
            [[number(each.rows[0].trial.number), number(each.mean, f"{{:.{findings.digits}f}}"),
              number(each.spread, f"{{:.{findings.digits}f}}"), number(len(each.scores)),
              *hyperparameters(findings, each.rows[0])] for each in finalists], marked=[0]))
    parts.append(tag("div", picture(f"{name}-curves", pictures.get("curves")),
                     picture(f"{name}-importance", pictures.get("importance"))
                     or tag("p", f"No importances: {found.why}.", class_="note"), class_="side"))
    parts.append(picture(f"{name}-response", pictures.get("response")))
    parts.append(table(
        f"{name}-trials", f"Trials of study {study.name}"
        + (f", the best {TOP} of {len(own)}" if len(own) > TOP else "") + ": longest trained first, then by score.",
        [("trial", "number"), (search.metric, "number"), ("epochs", "number"), ("status", "text"),
         *columns_of(findings)],
        [[number(row.trial.number), trained(findings, row), number(row.epochs), findings.status(row),
          *hyperparameters(findings, row)] for row in own[:TOP]]))
    if finalists:
        best = findings.folder / "studies" / study.name / "best.yaml"
        parts += [tag("p", f"Train the winner, trial {finalists[0].rows[0].trial.number}, again to the same number:"),
                  tag("pre", tag("code", retraining_command(findings.search, best)), tabindex=0)]
    return tag("section", *parts, aria_labelledby=name)


# ---- what was run


def run_section(findings: Findings, past: History, shown: Picture | None) -> Html:
    search, saved, where = findings.search, saving(findings), places(findings)
    epochs, whole, repeats = epochs_spent(findings)
    pairs = [("epochs trained", f"{epochs}" + (f", and {repeats} for finalists’ other seeds" if repeats else "")),
             ("training time, all trials added up", duration(saved.spent)
              + (f", and {duration(saved.repeats)} for other seeds" if saved.repeats else "")),
             ("without early stopping (estimate)", f"{duration(saved.whole)}, {whole} epochs; "
              f"{100 * saved.share:.0f} % of the time was saved")]
    if past.sessions:
        began, ended = (time.strftime("%Y-%m-%d %H:%M", time.localtime(each))
                        for each in (past.sessions[0][0], past.sessions[-1][1]))
        parts = len(past.sessions)
        pairs += [("the search ran for", duration(past.seconds) + (f", in {parts} parts" if parts > 1 else "")),
                  ("from, to", f"{began} to {ended}")]
    pairs += [(name, tag("ul", *(tag("li", f"{text} ({count} runs)") for text, count in counted.most_common())))
              for name, counted in (("machines", where.machines), ("code", where.code), ("packages", where.packages))
              if counted]
    space = table("space", "The sampled space.",
                  [("hyperparameter", "text"), ("recipe key", "text"), ("distribution", "text"), ("values", "text")],
                  [[name, tag("code", sampler.key), sampler.sample, _values(sampler)]
                   for name, sampler in search.space.items()], sortable=False)
    rules = facts(
        ("recipe", search.recipe or "–"),
        ("for every trial", ", ".join(f"{key} = {value}" for key, value in search.overrides.items()) or "as it is"),
        ("early stopping", f"ASHA per study: rungs at epochs {_rungs(findings)}; 1 of {search.reduction} goes on"),
        ("draws", f"{search.searcher}, seed {search.seed}, {search.trials} trials a study"),
        ("a trial’s share", f"{search.workers} × ({search.cpus:g} CPU, {search.gpus:g} GPU)"),
    )
    return tag("section", tag("h2", "What was run", id="run"), facts(*pairs), picture("timeline", shown),
               tag("h3", "The search", id="the-search"), rules, space if search.space else "", aria_labelledby="run")


def _values(sampler: Sampler) -> str:
    return ", ".join(map(str, sampler.values)) if sampler.sample == "choice" else f"{sampler.low:g} to {sampler.high:g}"


def _rungs(findings: Findings) -> str:
    found = {json.dumps(findings.rungs(study.name)): (findings.rungs(study.name), findings.full[study.name])
             for study in findings.studies}
    return "; ".join(f"{', '.join(map(str, steps)) or 'none'} of {most}" for steps, most in found.values())


# ---- all trials


def trials_section(findings: Findings) -> Html:
    search = findings.search
    won = {id(row) for own in findings.finalists.values() for row in own[0].rows}
    columns = [("study", "text"), ("trial", "number"), ("seed", "number"), ("drawn by", "text"), ("status", "text"),
               ("epochs", "number"), (search.metric, "number"), *columns_of(findings), ("bits", "number"),
               ("bytes", "number"), ("seconds", "number")]
    rows = [[row.trial.study, number(row.trial.number), number(row.trial.repeat), row.trial.source,
             findings.status(row) + (" (winner)" if id(row) in won else ""), number(row.epochs),
             trained(findings, row), *hyperparameters(findings, row), number(row.trial.cost.get("average_bits")),
             number(row.trial.cost.get("bytes"), "{:,.0f}"), number(row.seconds, "{:.1f}")] for row in findings.rows]
    shown = table("all", "Every trial in the order in which they were decided on; seed 0 is the search’s own, others "
                  "are repeats of finalists.", columns, rows,
                  marked=[i for i, row in enumerate(findings.rows) if id(row) in won])
    return tag("section", tag("h2", "All trials", id="trials"),
               tag("p", "The same, with all decimals: ", tag("code", "trials.csv"), " and ",
                   tag("code", "trials.parquet"), " in the search’s folder."),
               tag("details", tag("summary", f"Show {len(rows)} trials"), shown), aria_labelledby="trials")


def listing(items: list[Html]) -> Html:
    return tag("ul", join([tag("li", item) for item in items]))
