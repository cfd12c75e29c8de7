"""The folder of a search: one process at a time, one search per folder, the same search continues.

    search.yaml, recipe.yaml   what is searched, resolved          trials/STUDY/NUMBER/  each trial's run directory
    trials.jsonl               every trial, once decided on        events.jsonl          what happened to them, when
    rungs                      ASHA's rungs, with every result     extended              trials that --extend added
    finished                   there when all trials have ended    ray/                  what Tune writes: not read
    array/                     a recipe per trial (tune.array)     launch/               a batch job's script and logs
    wandb/                     what W&B keeps, where it is used
    trials.csv, trials.parquet, leaderboard.txt, studies/, report/   the results
"""

import dataclasses

from nulsq.config import Recipe, differences, load, load_recipe, to_yaml
from nulsq.errors import InputError
from nulsq.files import write_atomically
from nulsq.run.directory import LAUNCH, lock_folder
from tune.space import Search
from tune.store import journal

ARRAY = "array"
# Settings that may change between the parts of a search: they do not enter what it finds. What the recipe says is
# compared, wherever it lies.
FREE = {"dir", "recipe", "concurrent", "reuse", "retries", "hours", "cpus", "address", "nodes", "patience", "wandb",
        "mlflow"}


class SearchDirectory:
    """As a context manager, makes the folder and holds its lock."""

    def __init__(self, search: Search):
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
        return (self.path / "finished").is_file()

    def mark_finished(self) -> None:
        (self.path / "finished").touch()

    def extend(self, trials: int) -> None:
        """Add trials to each study of a search that has begun."""
        write_atomically(self.path / "extended", f"{journal.extended(self.path) + trials}\n")
        (self.path / "finished").unlink(missing_ok=True)

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
        elif self.path.exists() and (not self.path.is_dir() or {each.name for each in self.path.iterdir()} - {LAUNCH}):
            raise InputError(f"{self.path} exists and holds something else; choose another dir")

    def __enter__(self) -> "SearchDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.path, "searching")
        except OSError as error:
            raise InputError(f"search directory {self.path} cannot be written: {error}") from None
        if not self.begun:
            write_atomically(self.path / "recipe.yaml", to_yaml(self.recipe))
            write_atomically(self.path / "search.yaml", to_yaml(self.given))
        journal.repair(self.path)
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()
