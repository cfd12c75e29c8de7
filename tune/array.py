"""The trials of a search as an array of runs, without Ray: any batch system trains each of them to its end.

    python -m tune.array configs/search/demo.yaml trials=12
    python -m nulsq.train runs/search-demo/array/00003.yaml               # task 3 of the array, in any order
    python -m tune.status runs/search-demo                                # state so far; tune.report works too
    python -m tune.search configs/search/demo.yaml trials=12              # once all tasks have ended: the rest

All trials are decided on at once. They are the trials that `tune.search` would start: random and quasirandom samples do
not depend on results. Those of searcher tpe do, so it cannot be an array. The folder of the search gets the files that
a search writes there (search.yaml, recipe.yaml, trials.jsonl), and

    array/00000.yaml ...    a complete recipe for each trial      array/runs.txt    its run directory, one per line

Nothing is stopped early, and finalists are not trained with other seeds. `tune.search` does that afterwards in the same
folder, where it finds the trained trials, and evaluates the winners on the test images. Running the same command again
writes the same files and adds nothing. Exit codes: 0, or 2 for bad input.
"""

import dataclasses
import shlex
from pathlib import Path

from nulsq.config import to_yaml
from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.run.directory import path_of
from tune.checks import NetworkCosts, check_recipes
from tune.queue import TrialQueue, warm_start_results
from tune.ray_backend.trial_protocol import TrialSettings
from tune.space import Search, Trial, base_recipe, full_epochs, load_search, studies
from tune.store import journal
from tune.store.directory import ARRAY, SearchDirectory
from tune.store.results import TrialResult, collect, read_stopped
from tune.subprocess_call import run_in_subprocess


def parser() -> Parser:
    parser = Parser(prog="python -m tune.array", description=__doc__)
    parser.add_argument("search", help="YAML file, see configs/search/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for python -m tune.search")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    folder = SearchDirectory(load_search(arguments.search, arguments.overrides))
    folder.check()
    search = folder.search
    if search.searcher == "tpe":
        raise InputError("searcher = tpe learns from results, and an array is decided on before there are any; "
                         "allowed: random, quasirandom")
    stopped = sorted(read_stopped(folder.path))
    if stopped:
        raise InputError(f"tune.search has stopped trials early in {folder.path} ({', '.join(stopped[:3])}), an array "
                         "trains all of them to their end; choose another dir")
    run_in_subprocess(check_recipes, search)
    warm_start = warm_start_results(search)
    with folder:
        recipes = write(search, folder.path.resolve(), warm_start)
    print(plan(search, recipes, [arguments.search, *arguments.overrides]))
    print(len(recipes))
    return ExitCode.FINISHED


def decide(search: Search, known: list[Trial], warm_start: dict[str, list[TrialResult]]) -> list[Trial]:
    """Every trial of the search without repeats: those of its journal, `known`, then all others."""
    first = [trial for trial in known if not trial.repeat]
    queue = TrialQueue(dataclasses.replace(search, repeats=0), collect(search, first), warm_start)
    while queue.next() is not None:
        pass
    return list(queue.trials.values())


def write(search: Search, folder: Path, warm_start: dict[str, list[TrialResult]]) -> list[Path]:
    """Decide on all trials, add the new ones to the journal, write recipes and the list of their run directories.

    `folder` is the search's, absolute. Its recipe.yaml is the recipe as it was when the search began, and every trial
    starts from it, as trials on Ray do. Returns the paths of the trials' recipes.
    """
    search = dataclasses.replace(search, recipe=str(folder / "recipe.yaml"))
    array, known, costs = folder / ARRAY, journal.read(folder), NetworkCosts()
    array.mkdir(exist_ok=True)
    known_keys, recipes, runs = {trial.key for trial in known}, [], []
    for number, trial in enumerate(decide(search, known, warm_start)):
        if trial.key not in known_keys:
            trial = dataclasses.replace(trial, cost=costs.of(base_recipe(search, trial.overrides)))
            journal.append(folder, trial)
        recipe = TrialSettings.of(search, trial, folder).load_recipe()
        recipes.append(array / f"{number:05d}.yaml")
        write_atomically(recipes[-1], to_yaml(recipe))
        runs.append(path_of(recipe))
    write_atomically(array / "runs.txt", "".join(f"{run}\n" for run in runs))
    return recipes


def plan(search: Search, recipes: list[Path], arguments: list[str]) -> str:
    """What was written and the commands that come next; `arguments`: those of this command."""
    epochs = sum(full_epochs(search).values()) * search.trials
    array = search.directory / ARRAY
    repeats = "finalists with other seeds, " if search.repeats else ""
    return "\n".join([
        f"search {search.name} in {search.directory}: {len(studies(search))} studies of {search.trials} trials, each "
        f"trained to its end: {epochs} epochs",
        f"recipes {array}/{recipes[0].name} to {recipes[-1].name}, run directories in {array}/runs.txt, one per line",
        f"  each task    {shlex.join(['python', '-m', 'nulsq.train', str(array / recipes[0].name)])}",
        "               from this folder, where relative paths in recipes start; in any order; the same command again "
        "after an interruption",
        f"  any time     {shlex.join(['python', '-m', 'tune.status', str(search.directory)])}",
        f"  at the end   {shlex.join(['python', '-m', 'tune.search', *arguments])}",
        f"               {repeats}winners on the test images, the report"])


if __name__ == "__main__":
    raise SystemExit(main())
