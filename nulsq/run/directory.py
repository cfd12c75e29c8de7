"""The run directory: the only thing that evaluation, inspection and search results read.

    recipe.yaml    the resolved recipe          metrics.jsonl   a line per epoch
    code.txt       versions, environment        outcome.json    how the run ended, and whether to requeue it
    checkpoints/   the newest two and the best  tensorboard/    the log
    test.json      accuracy on the test images, written by `nulsq.evaluate`
    oscillations.jsonl   a line per epoch, where the recipe tracks oscillating weights: how many weights of each layer
                         oscillate, how many are frozen

One process trains in a run directory at a time and holds its `lock`. The same recipe resumes the run; another recipe
is an error that names the settings.
"""

from pathlib import Path
from typing import Any, TextIO

from nulsq.config import Recipe, differences, load, to_yaml
from nulsq.errors import InputError
from nulsq.files import append_line, lock, read_lines, write_atomically, write_lines
from nulsq.run.provenance import describe_code

# Settings that may change between the parts of a run: the numbers do not depend on them.
FREE = {"name", "run.dir", "run.root", "run.train_id", "run.device", "run.threads", "run.log_every", "data.loader",
        "data.workers", "data.patience", "run.save_every"}
TIMES = {"images_per_second", "wait_share", "seconds"}  # metrics that depend on the clock
METRICS, OSCILLATIONS = "metrics.jsonl", "oscillations.jsonl"
LAUNCH = "launch"  # a batch job's script, logs and code: may exist before the run does


def path_of(recipe: Recipe) -> Path:
    """The recipe's run directory: run.dir, or ROOT/NAME-TRAIN_ID."""
    if not (recipe.run.dir or recipe.name):
        raise InputError("the recipe has neither a name nor run.dir; load it with load_recipe, or set one")
    return Path(recipe.run.dir or Path(recipe.run.root) / f"{recipe.name}-{recipe.run.train_id}")


class RunDirectory:
    """A run directory that this process writes to. Only rank 0 writes; the other ranks know its path."""

    def __init__(self, path: Path):
        self.path = path
        self._lock_file: TextIO | None = None

    def start(self, recipe: Recipe) -> None:
        """Create the directory, or reopen it, and lock it. Raises InputError where that is not possible."""
        path = self.path
        if (path / "recipe.yaml").is_file():
            _check_same_recipe(path, recipe)
        elif path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - {LAUNCH}):
            raise InputError(f"run directory {path} exists and holds something else; choose another run.dir")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_file = lock_folder(path, "training")
            if not (path / "recipe.yaml").is_file():
                write_atomically(path / "recipe.yaml", to_yaml(recipe))
            with (path / "code.txt").open("a") as file:
                file.write(describe_code())
        except OSError as error:
            raise InputError(f"run directory {path} cannot be written: {error}") from None

    def release(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append to one of the records, METRICS or OSCILLATIONS."""
        append_line(self.path / name, record)

    def truncate_records(self, epoch: int) -> None:
        """Drop the records after an epoch: a resumed run writes them again."""
        for name in (METRICS, OSCILLATIONS):
            if name == METRICS or (self.path / name).is_file():
                write_lines(self.path / name, [line for line in read_lines(self.path / name) if line["epoch"] <= epoch])


def lock_folder(path: Path, action: str) -> TextIO:
    """Hold a folder's `lock` until the returned file is closed. Raises InputError where another process holds it."""
    file = lock(path / "lock")
    if file is None:
        raise InputError(f"another process is {action} in {path}")
    return file


def read_recipe(path: Path) -> Recipe:
    """The resolved recipe of a run directory. Raises InputError for any other folder."""
    if not (path / "recipe.yaml").is_file():
        raise InputError(f"{path} is not a run directory (no recipe.yaml)")
    return load(Recipe, path / "recipe.yaml")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics of each epoch, in order."""
    return read_lines(path / METRICS)


def _check_same_recipe(path: Path, recipe: Recipe) -> None:
    changed = differences(read_recipe(path), recipe, FREE)
    if changed:
        raise InputError(f"{path} holds a run of another recipe ({'; '.join(changed[:4])}"
                         f"{'; ...' if len(changed) > 4 else ''}); choose another run.dir or run.train_id")
