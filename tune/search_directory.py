"""The folder of a search: one process at a time, one search per folder, the same search continues.

    search.yaml, recipe.yaml   what is searched, resolved          trials/STUDY/NUMBER/  each trial's run directory
    rungs                      ASHA's rungs, with every result     ray/                  Tune's own state
    finished                   there when all trials have ended    trials.csv, leaderboard.txt, search.png, studies/
"""

from nulsq.config import Recipe, differences, load, load_recipe, to_yaml
from nulsq.errors import InputError
from nulsq.run_directory import lock, write_atomically
from tune.space import Search


class SearchDirectory:
    """As a context manager, makes the folder and holds its lock."""

    def __init__(self, search: Search):
        self.search, self.path = search, search.directory
        self.recipe = load_recipe(search.recipe, search.overrides)

    @property
    def finished(self) -> bool:
        return (self.path / "finished").is_file()

    def mark_finished(self) -> None:
        (self.path / "finished").touch()

    def check(self) -> None:
        """Raises InputError where the folder holds another search, or something else."""
        if (self.path / "search.yaml").is_file():
            for file, cls, now in (("search.yaml", Search, self.search), ("recipe.yaml", Recipe, self.recipe)):
                changed = differences(load(cls, self.path / file), now, {"dir"})
                if changed:
                    raise InputError(f"{self.path} holds another search ({'; '.join(changed[:3])}); "
                                     "choose another dir")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and holds something else; choose another dir")

    def __enter__(self) -> "SearchDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.path, "searching")
        except OSError as error:
            raise InputError(f"search directory {self.path} cannot be written: {error}") from None
        if not (self.path / "search.yaml").is_file():
            write_atomically(self.path / "recipe.yaml", to_yaml(self.recipe))
            write_atomically(self.path / "search.yaml", to_yaml(self.search))
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()
