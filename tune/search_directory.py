"""The folder of a search: one process at a time, one search per folder, the same search continues.

    search.yaml, recipe.yaml   what is searched, resolved          trials/STUDY/NUMBER/  each trial's run directory
    rungs                      ASHA's rungs, with every result     ray/                  Tune's own state
    finished                   there when all trials have ended    trials.csv, leaderboard.txt, search.png, studies/
"""

import fcntl

from nulsq.config import Recipe, flatten, load, load_recipe, to_yaml
from nulsq.errors import InputError
from nulsq.run_directory import write_atomically
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
                before, now = flatten(load(cls, self.path / file)), flatten(now)
                changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in sorted(before.keys() | now.keys())
                           if key != "dir" and before.get(key) != now.get(key)]
                if changed:
                    raise InputError(f"{self.path} holds another search ({'; '.join(changed[:3])}); "
                                     "choose another dir")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and holds something else; choose another dir")

    def __enter__(self) -> "SearchDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = (self.path / "lock").open("a")
        except OSError as error:
            raise InputError(f"search directory {self.path} cannot be written: {error}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is searching in {self.path}") from None
        if not (self.path / "search.yaml").is_file():
            write_atomically(self.path / "recipe.yaml", to_yaml(self.recipe))
            write_atomically(self.path / "search.yaml", to_yaml(self.search))
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()
