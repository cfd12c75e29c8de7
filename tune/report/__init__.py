"""The report of a search: an HTML page that opens from disk, figures, and tables for further analysis.

    python -m tune.report runs/search-demo        # the search may be finished, interrupted or running

    findings.py      the results of a search: ranked trials, finalists, the epoch at which trials are compared
    leaderboard.py   leaderboard.txt
    exports.py       trials.csv, trials.parquet, each study's best.yaml
    effort.py        epochs and seconds spent, and without early stopping
    timeline.py      which trial ran when and where
    pareto.py        the Pareto front of score against average bits and bytes
    importance.py    fANOVA: the share of the scores' variance that each hyperparameter explains
    figures.py       learning curves, Pareto fronts, the timeline; responses.py: the effect of hyperparameters
    page.py          index.html; page_tables.py: the content of its tables; templates/: its text, style and script
"""

import dataclasses
from pathlib import Path
from typing import Any

from tune.report.leaderboard import leaderboard
from tune.space import Search
from tune.store.results import TrialResult

__all__ = ["leaderboard", "write"]


def write(search: Search, folder: Path, results: list[TrialResult], tests: dict[str, list[dict[str, Any]]],
          out: Path | None = None, running: bool = False) -> list[Path]:
    """Write the whole report and return the paths.

    trials.csv, trials.parquet, leaderboard.txt and studies/STUDY/best.yaml are written to the search's `folder`,
    index.html and the figures to `out` (default: folder/report). `tests`: study -> evaluations of the seeds of its
    winner on the test images, an empty list if there are none. `running`: the search has not ended; the page says so.
    Raises InputError if a package of the extra `search` is missing.
    """
    from tune.report.exports import write_exports
    from tune.report.findings import Findings
    from tune.report.page import write_page

    findings = Findings(dataclasses.replace(search, dir=str(folder)), results, tests, running)
    return [*write_exports(findings), *write_page(findings, out or folder / "report")]
