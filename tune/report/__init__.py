"""The report of a search: one HTML page that needs nothing else, pictures, and tables for people's own analysis.

    python -m tune.report runs/search-demo        # of a search that is finished, interrupted, or still running

    findings.py     a search as the report looks at it: ranked trials, finalists, the epoch at which trials compare
    tables.py       leaderboard.txt, trials.csv, trials.parquet, each study's best.yaml
    front.py        the Pareto front of accuracy against average bits and bytes
    importance.py   fANOVA: the share of the scores' variance that each hyperparameter explains, how sure, what chance
                    alone would show
    history.py      what ran when and where; what it would have cost without early stopping
    figures.py      learning curves, fronts, the timeline         responses.py   response to each hyperparameter
    page.py         puts the page together, page_tables.py its tables; the text is in templates/page.html
"""

import dataclasses
from pathlib import Path
from typing import Any

from tune.report.tables import leaderboard
from tune.space import Search
from tune.store.results import TrialResult

__all__ = ["leaderboard", "write"]


def write(search: Search, folder: Path, rows: list[TrialResult], tests: dict[str, list[dict[str, Any]]],
          out: Path | None = None, running: bool = False) -> list[Path]:
    """Write everything and return the paths.

    trials.csv, trials.parquet, leaderboard.txt and studies/STUDY/best.yaml go into the search's folder, index.html
    and the pictures into `out`, folder/report where nothing else is said. `tests`: study -> what each of its winner's
    seeds reached on the test images, empty lists where nobody has looked yet. `running`: the search goes on meanwhile,
    and the page says so. Raises InputError where a package of the extra `search` is missing.
    """
    from tune.report.findings import Findings
    from tune.report.page import write_page
    from tune.report.tables import write_tables

    findings = Findings(dataclasses.replace(search, dir=str(folder)), rows, tests, running)
    return [*write_tables(findings), *write_page(findings, out or folder / "report")]
