"""The report of a search, from its folder: a page, pictures, and tables for people's own analysis.

    python -m tune.report runs/search-demo                   # finished, interrupted or still running: the page says so
    python -m tune.report runs/search-demo --out /tmp/page   # the page and its pictures elsewhere

Into the search's folder: trials.csv, trials.parquet, leaderboard.txt, studies/STUDY/best.yaml. Into --out: index.html,
which needs neither a network nor the pictures beside it. Nothing is trained or evaluated: the winners' accuracies on
test are read from their runs, where `tune.search` leaves them at its end.
"""

from pathlib import Path

from nulsq.errors import InputError, Parser, exit_on_input_error, require
from tune.report import write
from tune.report.tables import leaderboard
from tune.status import is_running
from tune.store import journal
from tune.store.results import collect, read_evaluations, winners


def parser() -> Parser:
    made = Parser(prog="python -m tune.report", description=__doc__)
    made.add_argument("folder", type=Path, metavar="DIR", help="folder of a search")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder of the page and the pictures (DIR/report)")
    made.add_argument("--no-test", action="store_true", help="leave out accuracies on the test images")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    search = journal.load_folder(arguments.folder)
    # looked for before anything is written
    require("pandas", "search"), require("pyarrow", "search"), require("matplotlib", "search")
    require("jinja2", "search"), require("optuna", "search"), require("sklearn", "search")
    rows = collect(search, journal.read(arguments.folder))
    if not rows:
        raise InputError(f"{arguments.folder}: no trial was begun yet")
    tests = {} if arguments.no_test else read_evaluations(winners(search, rows))
    try:
        made = write(search, arguments.folder, rows, tests, arguments.out, is_running(arguments.folder))
    except OSError as error:
        raise InputError(f"cannot be written: {error}") from None
    print(leaderboard(search, rows, tests))
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
