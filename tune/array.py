"""The trials of a search as an array of runs, without Ray: any batch system trains them, each to its end.

    python -m tune.array configs/search/demo.yaml trials=12
    python -m nulsq.train runs/search-demo/array/00003.yaml --no-test     # task 3 of the array, in any order
    python -m tune.status runs/search-demo                                # and tune.report: what is there, at any time
    python -m tune.search configs/search/demo.yaml trials=12              # once all have ended: what is left

All trials are decided on at once. They are those that `tune.search` would draw: random and quasirandom draws look at
no results. Those of searcher tpe do, so it has no array. Into the folder of the search goes what a search writes there
(search.yaml, recipe.yaml, trials.jsonl), and

    array/00000.yaml ...    a complete recipe for each trial      array/runs.txt    its run directory, a line for each

Nothing is stopped early, and the finalists are not trained with other seeds: `tune.search` does that afterwards in the
same folder, where it finds the trials trained, and evaluates the winners on the test images. The same command again
writes the same files and adds nothing. Exit codes: 0, or 2 for input that cannot be used.
"""

import dataclasses
import shlex
from pathlib import Path

from nulsq.config import to_yaml
from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.run.directory import path_of
from tune.checks import NetworkCosts, check_recipes
from tune.queue import TrialQueue, warm_rows
from tune.ray_backend.trial_protocol import recipe_of
from tune.space import Search, Trial, full_epochs, load_search, studies
from tune.store import journal
from tune.store.directory import ARRAY, SearchDirectory
from tune.store.results import TrialResult, collect, read_stopped
from tune.subprocess_call import run_in_subprocess


def parser() -> Parser:
    made = Parser(prog="python -m tune.array", description=__doc__)
    made.add_argument("search", help="YAML file, see configs/search/")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for python -m tune.search")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    folder = SearchDirectory(load_search(arguments.search, arguments.overrides))
    folder.check()
    search = folder.search
    if search.searcher == "tpe":
        raise InputError("searcher = tpe learns from results, and an array is drawn before there are any; allowed: "
                         "random, quasirandom")
    stopped = sorted(read_stopped(folder.path))
    if stopped:
        raise InputError(f"tune.search has stopped trials early in {folder.path} ({', '.join(stopped[:3])}), an array "
                         "trains all to their end; choose another dir")
    run_in_subprocess(check_recipes, search)
    warm = warm_rows(search)
    with folder:
        recipes = write(search, folder.path.resolve(), warm)
    print(plan(search, recipes, [arguments.search, *arguments.overrides]))
    print(len(recipes))
    return ExitCode.FINISHED


def decide(search: Search, known: list[Trial], warm: dict[str, list[TrialResult]]) -> list[Trial]:
    """Every trial of the search but repeats: those that its journal has, `known`, then all that it would draw."""
    first = [trial for trial in known if not trial.repeat]
    course = TrialQueue(dataclasses.replace(search, repeats=0), collect(search, first), warm)
    while course.next() is not None:
        pass
    return list(course.trials.values())


def write(search: Search, folder: Path, warm: dict[str, list[TrialResult]]) -> list[Path]:
    """Decide on all trials, add the new ones to the journal, write recipes and the list of their run directories.

    `folder` is the search's, absolute, and holds its recipe.yaml: as for a trial that Ray starts, the recipe is what it
    was when the search began. Returns the paths of the trials' recipes.
    """
    array, known, costs = folder / ARRAY, journal.read(folder), NetworkCosts()
    array.mkdir(exist_ok=True)
    begun, files, runs = {trial.key for trial in known}, [], []
    for number, trial in enumerate(decide(search, known, warm)):
        recipe = recipe_of({"directory": str(folder), "recipe": str(folder / "recipe.yaml"), "cpus": search.cpus,
                            "gpus": search.gpus,
                            "trial": {"key": trial.key, "overrides": search.overrides | trial.overrides}})
        if trial.key not in begun:
            journal.append(folder, dataclasses.replace(trial, cost=costs.of(recipe)))
        files.append(array / f"{number:05d}.yaml")
        write_atomically(files[-1], to_yaml(recipe))
        runs.append(path_of(recipe))
    write_atomically(array / "runs.txt", "".join(f"{run}\n" for run in runs))
    return files


def plan(search: Search, recipes: list[Path], words: list[str]) -> str:
    """What was written, and how to go on; `words`: the search and its settings, as they were given."""
    epochs = sum(full_epochs(search).values()) * search.trials
    shown = search.directory / ARRAY
    rest = "finalists with other seeds, " if search.repeats else ""
    return "\n".join([
        f"search {search.name} in {search.directory}: {len(studies(search))} studies of {search.trials} trials, each "
        f"trained to its end: {epochs} epochs",
        f"{shown}/{recipes[0].name} to {recipes[-1].name}, run directories in {shown}/runs.txt, a line for each",
        f"  each    {shlex.join(['python', '-m', 'nulsq.train', str(shown / recipes[0].name), '--no-test'])}",
        "          from this folder, where paths in recipes start, in any order; again after an interruption",
        f"  look    {shlex.join(['python', '-m', 'tune.status', str(search.directory)])}",
        f"  after   {shlex.join(['python', '-m', 'tune.search', *words])}",
        f"          once all have ended: {rest}winners on the test images, the report"])


if __name__ == "__main__":
    raise SystemExit(main())
