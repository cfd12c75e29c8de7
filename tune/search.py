"""Search hyperparameters over a grid of studies with ASHA, on this machine or on a Ray cluster.

    python -m tune.search configs/search/demo.yaml --dry-run
    python -m tune.search configs/search/demo.yaml trials=12 space.lr.high=0.2
    python -m tune.search configs/search/demo.yaml --extend 6          # six more trials for each study

The same command continues an interrupted search, and shows the results of a finished one. Ctrl-C, SIGTERM and SIGUSR1
interrupt it, and nothing is lost. `touch DIR/trials/STUDY/NUMBER/save` saves a trial within its epoch. In another
terminal, `python -m tune.status DIR` shows the state of the search and `python -m tune.report DIR` writes a report of
its results so far.

Trials are selected on the holdout only. At the end, each study's winner is evaluated once on the test images.
Exit codes: 0 finished, or the time budget is used up; 1 no trial reached its end; 2 bad input; 99 interrupted.
"""

import argparse
import dataclasses
import importlib.util
import json
import signal
import sys
from typing import Any

from nulsq.config import describe
from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error, missing
from tune.checks import NetworkCosts, check
from tune.queue import TrialQueue, warm_start_results
from tune.space import Search, base_recipe, expected_epochs, full_epochs, load_search, rungs, studies
from tune.status import elapsed
from tune.store import journal
from tune.store.directory import SearchDirectory, trial_directory
from tune.store.results import collect, evaluate_winners, read_evaluations, remove_checkpoints, winners
from tune.subprocess_call import run_in_subprocess


def parser() -> Parser:
    parser = Parser(prog="python -m tune.search", description=__doc__,
                    epilog="\n".join(["settings (key=default):", *describe(Search)]))
    parser.add_argument("search", help="YAML file, see configs/search/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, which override those of the file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print the plan as one line of JSON")
    parser.add_argument("--extend", type=int, metavar="N", help="add N trials to each study of a finished search")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues")
        return ExitCode.SAVED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _main(arguments: argparse.Namespace) -> int:
    if arguments.json and not arguments.dry_run:
        raise InputError("--json needs --dry-run: it prints the plan as JSON")
    folder = SearchDirectory(load_search(arguments.search, arguments.overrides))
    folder.check()
    more = arguments.extend or 0
    if arguments.extend is not None:
        if more < 1:
            raise InputError(f"--extend {more}, allowed: at least 1")
        if not folder.finished:
            raise InputError(f"--extend: the search in {folder.path} has not finished; the same command without "
                             "--extend starts or continues it")
    search = dataclasses.replace(folder.search, trials=folder.search.trials + more)
    if not folder.finished or more:
        gpus, costs = run_in_subprocess(check, search, not arguments.dry_run)
        warm_start = warm_start_results(search)
        if not arguments.json:
            print(plan(search, gpus), flush=True)
    if arguments.dry_run:
        if arguments.json:
            print(json.dumps(plan_for_programs(search, folder)))
        return ExitCode.FINISHED
    with folder:
        # The recipe as it was when the search began; the file may have been edited since.
        search = dataclasses.replace(search, recipe=str(folder.path.resolve() / "recipe.yaml"))
        if folder.finished and not more:
            return show(search, folder)
        if more:
            folder.extend(more)
        queue = TrialQueue(search, collect(search, journal.read(folder.path)), warm_start)
        return run(search, folder, queue, costs)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def plan(search: Search, gpus: int) -> str:
    """The plan as text: studies, rungs, trials and the budget in epochs. `gpus`: how many this machine has."""
    lines = [f"search {search.name} in {search.directory}: {len(studies(search))} studies of {search.trials} trials, "
             f"ranked by {search.metric} on the holdout"]
    most, expected, full = 0, 0.0, full_epochs(search)
    for study in studies(search):
        epochs = full[study.name]
        repeats = search.finalists * search.repeats * epochs
        expected += expected_epochs(search, epochs) + repeats
        most += search.trials * epochs + repeats
        settings = ", ".join(f"{key}={value}" for key, value in study.overrides.items())
        lines.append(f"  {study.name}: {settings or 'the recipe unchanged'}; rungs at epochs "
                     f"{', '.join(map(str, rungs(epochs, search.grace, search.reduction))) or 'none'} of {epochs}")
    for name, sampler in search.space.items():
        ends = ", ".join(map(str, sampler.ends())) if sampler.sample == "choice" else \
            f"{sampler.low:g} to {sampler.high:g}"
        lines.append(f"  {name}: {sampler.key}, {sampler.sample} {ends}")
    first = [*search.points, *([f"the best {search.warm_best} of {search.warm_start}"] if search.warm_start else [])]
    lines.append(f"sampled by: {search.searcher}{', after ' + ', '.join(first) if first else ''}")
    if search.repeats:
        lines.append(f"finalists: the best {search.finalists} of each study, with {search.repeats} more seeds")
    lines.append(f"budget: at most {most} epochs, about {round(expected)} or more with early stopping"
                 + (f"; {search.hours:g} hours" if search.hours else ""))
    if gpus and not search.gpus:
        lines.append("trials run on the CPU although this machine has a GPU: set gpus=1, or a fraction")
    return "\n".join(lines)


def plan_for_programs(search: Search, folder: SearchDirectory) -> dict[str, Any]:
    """The plan as a dict for JSON: what is searched, the resources, and whether it has begun or finished."""
    return {"name": search.name, "directory": str(search.directory), "recipe": search.recipe,
            "data": base_recipe(search, {}).data.path, "searcher": search.searcher,
            "studies": [study.name for study in studies(search)], "trials": search.trials,
            "total": TrialQueue(search, []).budget(), "workers": search.workers, "cpus": search.cpus,
            "gpus": search.gpus, "address": search.address, "hours": search.hours,
            "begun": folder.begun, "finished": folder.finished}


def run(search: Search, folder: SearchDirectory, queue: TrialQueue, costs: NetworkCosts) -> int:
    """Start or continue the search, then show and write its results. Returns the exit code."""
    extras = dict.fromkeys(("matplotlib", "pandas", "pyarrow", "sklearn", "optuna", "ray"), "search")
    for module, extra in (extras | {name: name for name in ("wandb", "mlflow") if getattr(search, name)}).items():
        if importlib.util.find_spec(module) is None:  # not imported yet: Ray reads its token when it is imported
            raise missing(module, extra)
    from tune.ray_backend.tuner import run_trials

    seconds_left = None
    if search.hours is not None:
        seconds_left = search.hours * 3600 - elapsed(journal.events(folder.path))
        if seconds_left <= 0:
            print(f"the time budget of {search.hours:g} hours is used up; with more hours the search continues")
            return show(search, folder, finished=queue.finished)
    for key, status in queue.status.items():  # the search may have been killed before it removed them
        if status.discarded:
            remove_checkpoints(trial_directory(folder.path, key))
    ended = queue.finished or run_trials(search, folder, queue, costs, seconds_left)
    used_up = search.hours is not None and search.hours * 3600 <= elapsed(journal.events(folder.path), running=True)
    if not ended and not used_up:
        print(f"interrupted; the same command continues the search in {search.directory}")
        return ExitCode.SAVED
    if not ended:
        print(f"the time budget of {search.hours:g} hours is used up, {queue.unfinished()} trials have not ended; "
              "the same command with more hours continues")
    return show(search, folder, finished=ended)


def show(search: Search, folder: SearchDirectory, finished: bool = True) -> int:
    """Print and write the results of a search; once all trials have ended, evaluate the winners on the test images.

    Returns the exit code.
    """
    from tune import report

    results = collect(search, journal.read(folder.path))
    best = winners(search, results)
    if not best and not finished:
        print("no trial has reached its end yet")
        return ExitCode.FAILED
    if not best:
        print(f"error: no trial has reached its end; the reasons are in {search.directory}/{journal.EVENTS} and "
              f"{search.directory}/trials/*/*/outcome.json; the same command tries again", file=sys.stderr)
        return ExitCode.FAILED
    if finished:
        folder.mark_finished()
        print("evaluating each study's winner on the test images ...", flush=True)
        tests = evaluate_winners(best)
    else:
        tests = read_evaluations(best)
    print("writing the report ...", flush=True)
    paths = report.write(search, folder.path, results, tests)
    print()
    print(report.leaderboard(search, results, tests))
    print("\n".join(str(path) for path in paths))
    return ExitCode.FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
