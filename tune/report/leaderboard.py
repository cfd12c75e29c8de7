"""leaderboard.txt: for each study its winner on test, its best trials on the holdout, its finalists."""

from typing import Any

from nulsq.text import aligned
from tune.report.effort import effort
from tune.report.findings import Findings
from tune.space import Search
from tune.store.results import Finalist, TrialResult


def leaderboard(search: Search, results: list[TrialResult], tests: dict[str, list[dict[str, Any]]],
                top: int = 5) -> str:
    """The leaderboard with the best `top` trials of each study."""
    return format_leaderboard(Findings(search, results, tests), top)


def format_leaderboard(findings: Findings, top: int = 5) -> str:
    search, lines = findings.search, []
    header = ["trial", search.metric, "epochs", "status", *search.space]
    for study in findings.studies:
        trials = findings.ranked(study.name)
        rows = [[str(result.trial.number), findings.format_score(result.score) if result.curve else "-",
                 str(result.epochs), findings.status(result),
                 *(short(result.trial.drawn.get(name)) for name in search.space)] for result in trials[:top]]
        lines.append(f"study {study.name}: {describe_winner(findings, study.name)}")
        lines += [f"  {line}" for line in aligned([header, *rows], left=())]
        if len(trials) > top:
            lines.append(f"  ({len(trials) - top} more in trials.csv)")
        lines += [f"  finalist {finalist.rows[0].trial.number}: {search.metric} {mean_and_spread(findings, finalist)}"
                  for finalist in findings.finalists.get(study.name, []) if len(finalist.scores) > 1]
        lines.append("")
    return "\n".join([*lines, str(effort(findings))])


def describe_winner(findings: Findings, study: str) -> str:
    """The accuracy of the study's winner on the test images, in words."""
    if findings.winner(study) is None:
        return "no trial has finished"
    tested = findings.test_accuracy(study)
    if tested is None:
        return "winner not evaluated on test"
    mean, spread, seeds = tested
    test = findings.tests[study][0]
    deviation = f" +- {spread:.2f}" if spread is not None else ""
    count = f"{seeds} seeds, " if seeds > 1 else ""
    leak = "; its starting weights were trained on the holdout" if test["start_saw_holdout"] else ""
    return f"winner's test top-1 {mean:.2f}{deviation} ({count}{test['test_images']} images{leak})"


def mean_and_spread(findings: Findings, finalist: Finalist) -> str:
    """For example "96.10 +- 0.12 (3 seeds)"."""
    mean = findings.format_score(finalist.mean)
    if finalist.spread is None:
        return f"{mean} (1 seed)"
    return f"{mean} +- {findings.format_score(finalist.spread)} ({len(finalist.scores)} seeds)"


def short(value: Any) -> str:
    """A hyperparameter's value for a table."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
