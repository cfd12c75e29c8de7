"""Write the report of a search from its folder: a page, figures, and tables for further analysis.

    python -m tune.report runs/search-demo                   # finished, interrupted or running; the page says which
    python -m tune.report runs/search-demo --out /tmp/page   # the page and its figures elsewhere

Writes trials.csv, trials.parquet, leaderboard.txt and studies/STUDY/best.yaml to the search's folder, index.html and
the figures to --out. index.html contains the figures and needs no network. Nothing is trained or evaluated: the
winners' accuracies on test are read from their runs, where `tune.search` saves them at its end.
"""

from pathlib import Path

from nulsq.errors import InputError, Parser, exit_on_input_error, require
from tune.report import write
from tune.report.leaderboard import leaderboard
from tune.status import is_running
from tune.store import journal
from tune.store.results import collect, read_evaluations, winners


def parser() -> Parser:
    parser = Parser(prog="python -m tune.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a search")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder for the page and the figures (default: report in the search's folder)")
    parser.add_argument("--no-test", action="store_true", help="leave out accuracies on the test images")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    search = journal.load_folder(arguments.folder)
    for module in ("pandas", "pyarrow", "matplotlib", "jinja2", "optuna", "sklearn"):
        require(module, "search")  # before anything is written
    results = collect(search, journal.read(arguments.folder))
    if not results:
        raise InputError(f"{arguments.folder}: no trial has begun yet")
    tests = {} if arguments.no_test else read_evaluations(winners(search, results))
    try:
        paths = write(search, arguments.folder, results, tests, arguments.out, is_running(arguments.folder))
    except OSError as error:
        raise InputError(f"cannot write the report: {error}") from None
    print(leaderboard(search, results, tests))
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
