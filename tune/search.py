"""Search hyperparameters over a grid of studies with ASHA, on this machine or on a Ray cluster.

    python -m tune.search configs/search/demo.yaml --dry-run
    python -m tune.search configs/search/demo.yaml trials=12 space.lr.high=0.2
    python -m tune.search configs/search/demo.yaml --extend 6          # six more trials for each study

The same command continues a search that was interrupted, and shows the results of one that is finished. Ctrl-C,
SIGTERM and SIGUSR1 end it with everything kept; `touch DIR/trials/STUDY/NUMBER/save` saves a trial within its epoch.
Another terminal sees where it stands with `python -m tune.status DIR`, and `python -m tune.report DIR` makes the
report of what is there so far.

Selection sees the holdout only; each study's winner is evaluated once on the test images at the end.
Exit codes: 0 finished, or the time budget is used up; 1 nothing could be trained, 2 input that cannot be used, 99
interrupted.
"""

import dataclasses
import importlib.util
import json
import signal
import sys
from typing import Any

from nulsq.config import describe
from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error, missing
from tune.checks import NetworkCosts, check
from tune.queue import TrialQueue, warm_rows
from tune.ray_backend.trial_protocol import directory
from tune.space import Search, base_recipe, expected_epochs, full_epochs, load_search, rungs, studies
from tune.status import elapsed
from tune.store import journal, results
from tune.store.directory import SearchDirectory
from tune.store.results import remove_checkpoints
from tune.subprocess_call import run_in_subprocess


def parser() -> Parser:
    made = Parser(prog="python -m tune.search", description=__doc__,
                  epilog="\n".join(["settings (key=default):", *describe(Search)]))
    made.add_argument("search", help="YAML file, see configs/search/")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings, they win over the file")
    made.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    made.add_argument("--json", action="store_true", help="with --dry-run: the plan as one line of JSON, for programs")
    made.add_argument("--extend", type=int, metavar="N", help="N more trials for each study of a search that has begun")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
        return ExitCode.SAVED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main(arguments) -> int:
    if arguments.json and not arguments.dry_run:
        raise InputError("--json is the form of a plan: it needs --dry-run")
    folder = SearchDirectory(load_search(arguments.search, arguments.overrides))
    folder.check()
    more = arguments.extend or 0
    if arguments.extend is not None:
        if more < 1:
            raise InputError(f"--extend {more}, allowed: at least 1")
        if not folder.finished:
            raise InputError(f"--extend: the search in {folder.path} has not finished; the same command without it "
                             "starts it or goes on")
    search = dataclasses.replace(folder.search, trials=folder.search.trials + more)
    if not folder.finished or more:
        gpus, costs = run_in_subprocess(check, search, not arguments.dry_run)
        warm = warm_rows(search)
        if not arguments.json:
            print(plan(search, gpus), flush=True)
    if arguments.dry_run:
        if arguments.json:
            print(json.dumps(outline(search, folder)))
        return ExitCode.FINISHED
    with folder:
        # The recipe as it was when the search began: the file may have been edited since.
        search = dataclasses.replace(search, recipe=str(folder.path.resolve() / "recipe.yaml"))
        if folder.finished and not more:
            return show(search, folder)
        if more:
            folder.extend(more)
        return run(search, folder, TrialQueue(search, results.collect(search, journal.read(folder.path)), warm), costs)


def _interrupt(*_):
    raise KeyboardInterrupt


def plan(search: Search, gpus: int) -> str:
    """Studies, rungs, trials and the budget in epochs; `gpus` that this machine has."""
    lines = [f"search {search.name} in {search.directory}: {len(studies(search))} studies of {search.trials} trials, "
             f"ranked by {search.metric} on the holdout"]
    most, least, full = 0, 0.0, full_epochs(search)
    for study in studies(search):
        epochs = full[study.name]
        again = search.finalists * search.repeats * epochs
        least += expected_epochs(search, epochs) + again
        most += search.trials * epochs + again
        settings = ", ".join(f"{key}={value}" for key, value in study.overrides.items())
        lines.append(f"  {study.name}: {settings or 'the recipe as it is'}; rungs at epochs "
                     f"{', '.join(map(str, rungs(epochs, search.grace, search.reduction))) or 'none'} of {epochs}")
    for name, sampler in search.space.items():
        ends = ", ".join(map(str, sampler.ends())) if sampler.sample == "choice" else \
            f"{sampler.low:g} to {sampler.high:g}"
        lines.append(f"  {name}: {sampler.key}, {sampler.sample} {ends}")
    first = [*search.points, *([f"the best {search.warm_best} of {search.warm_start}"] if search.warm_start else [])]
    lines.append(f"draws: {search.searcher}{', after ' + ', '.join(first) if first else ''}")
    if search.repeats:
        lines.append(f"then the best {search.finalists} of each study with {search.repeats} more seeds")
    lines.append(f"budget: at most {most} epochs, about {round(least)} or more with early stopping"
                 + (f"; {search.hours:g} hours" if search.hours else ""))
    if gpus and not search.gpus:
        lines.append("trials run on the CPU although there is a GPU: set gpus=1, or a fraction")
    return "\n".join(lines)


def outline(search: Search, folder: SearchDirectory) -> dict[str, Any]:
    """The plan for programs: what is searched, what it asks for, and how far it is."""
    return {"name": search.name, "directory": str(search.directory), "recipe": search.recipe,
            "data": base_recipe(search, {}).data.path, "searcher": search.searcher,
            "studies": [study.name for study in studies(search)], "trials": search.trials,
            "total": TrialQueue(search, []).budget(), "workers": search.workers, "cpus": search.cpus,
            "gpus": search.gpus, "address": search.address, "hours": search.hours,
            "begun": folder.begun, "finished": folder.finished}


def run(search: Search, folder: SearchDirectory, course: TrialQueue, costs: NetworkCosts) -> int:
    """Start or continue the search, then show and write its results. Returns the exit code."""
    wanted = dict.fromkeys(("matplotlib", "pandas", "pyarrow", "sklearn", "optuna", "ray"), "search")
    for module, extra in (wanted | {name: name for name in ("wandb", "mlflow") if getattr(search, name)}).items():
        if importlib.util.find_spec(module) is None:  # looked for, not imported: Ray reads its token at import
            raise missing(module, extra)
    from tune.ray_backend.tuner import run_trials

    left = None
    if search.hours is not None:
        left = search.hours * 3600 - elapsed(journal.events(folder.path))
        if left <= 0:
            print(f"the time budget of {search.hours:g} hours is used up; more hours go on")
            return show(search, folder, finished=course.finished)
    for key, status in course.status.items():  # what was killed between a decision and its consequences
        if status.discarded:
            remove_checkpoints(directory(folder.path, key))
    ended = course.finished or run_trials(search, folder, course, costs, left)
    used = left is not None and search.hours * 3600 <= elapsed(journal.events(folder.path), running=True)
    if not ended and not used:
        print(f"interrupted; the same command continues the search in {search.directory}")
        return ExitCode.SAVED
    if not ended:
        print(f"the time budget of {search.hours:g} hours is used up, {course.unfinished()} trials have not ended; "
              "the same command with more hours goes on")
    return show(search, folder, finished=ended)


def show(search: Search, folder: SearchDirectory, finished: bool = True) -> int:
    """Results of a search: winners on test (once all trials have ended), leaderboard, files."""
    from tune import report

    rows = results.collect(search, journal.read(folder.path))
    best = results.winners(search, rows)
    if not best and not finished:
        print("no trial has reached its end yet")
        return ExitCode.FAILED
    if not best:
        print(f"error: no trial has reached its end; the reasons are in {search.directory}/{journal.EVENTS} and "
              f"{search.directory}/trials/*/*/outcome.json; the same command tries again", file=sys.stderr)
        return ExitCode.FAILED
    if finished:
        folder.mark_finished()
        print("each study's winner on the test images ...", flush=True)
        tests = results.evaluate_winners(best)
    else:
        tests = results.read_evaluations(best)
    print("the report ...", flush=True)
    made = report.write(search, folder.path, rows, tests)
    print()
    print(report.leaderboard(search, rows, tests))
    print("\n".join(str(path) for path in made))
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
