"""The folder of a search. One process at a time uses it, it holds one search, and the same search continues in it.

    search.yaml, recipe.yaml   what is searched, resolved          trials/STUDY/NUMBER/  each trial's run directory
    trials.jsonl               every trial, once decided on        events.jsonl          what happened to them, when
    rungs                      ASHA's rungs, with every score      extended              trials added by --extend
    finished                   exists once all trials have ended   ray/                  Tune's files, never read
    array/                     a recipe per trial (tune.array)     launch/               a batch job's script and logs
    wandb/                     files of W&B, where it is used
    trials.csv, trials.parquet, leaderboard.txt, studies/, report/   the results
"""

import dataclasses
from pathlib import Path

from nulsq.config import Recipe, differences, load, load_recipe, to_yaml
from nulsq.errors import InputError
from nulsq.files import write_atomically
from nulsq.run.directory import LAUNCH, lock_folder
from tune.space import Search
from tune.store import journal

ARRAY, RUNGS, FINISHED = "array", "rungs", "finished"
# Settings that may change when a search is continued: its results do not depend on them. The recipe is compared by
# content, not by path.
FREE = {"dir", "recipe", "concurrent", "reuse", "retries", "hours", "cpus", "address", "nodes", "patience", "wandb",
        "mlflow"}


def trial_directory(search_directory: Path, key: str) -> Path:
    """The run directory of a trial."""
    return search_directory / "trials" / key


class SearchDirectory:
    """The folder of `search`. As a context manager it creates the folder and holds its lock."""

    def __init__(self, search: Search) -> None:
        self.given, self.path = search, search.directory
        self.recipe = load_recipe(search.recipe, search.overrides)

    @property
    def search(self) -> Search:
        """The search with all trials that --extend added."""
        return dataclasses.replace(self.given, trials=self.given.trials + journal.extended(self.path))

    @property
    def begun(self) -> bool:
        return (self.path / "search.yaml").is_file()

    @property
    def finished(self) -> bool:
        return (self.path / FINISHED).is_file()

    def mark_finished(self) -> None:
        (self.path / FINISHED).touch()

    def extend(self, trials: int) -> None:
        """Add trials to each study of a search that has begun."""
        write_atomically(self.path / journal.EXTENDED, f"{journal.extended(self.path) + trials}\n")
        (self.path / FINISHED).unlink(missing_ok=True)

    def check(self) -> None:
        """Raises InputError where the folder holds another search, or something else."""
        if self.begun:
            before = load(Search, self.path / "search.yaml")
            changed = [*differences(before, self.given, FREE),
                       *differences(load(Recipe, self.path / "recipe.yaml"), self.recipe, set())]
            if changed:
                hint = "choose another dir"
                if self.given.trials > before.trials and len(changed) == 1:
                    hint = f"say --extend {self.given.trials - before.trials}, with trials={before.trials}"
                raise InputError(f"{self.path} holds another search ({'; '.join(changed[:3])}); {hint}")
        elif self.path.exists() and (not self.path.is_dir()
                                     or {entry.name for entry in self.path.iterdir()} - {LAUNCH}):
            raise InputError(f"{self.path} exists and holds something else; choose another dir")

    def __enter__(self) -> "SearchDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_file = lock_folder(self.path, "searching")
        except OSError as error:
            raise InputError(f"search directory {self.path} cannot be written: {error}") from None
        if not self.begun:
            write_atomically(self.path / "recipe.yaml", to_yaml(self.recipe))
            write_atomically(self.path / "search.yaml", to_yaml(self.given))
        journal.repair(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock_file.close()
