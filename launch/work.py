"""What is to be launched: a run, a search or an array of trials, looked at before anything is started.

Recipes are checked by `python -m nulsq.train ... --dry-run`, searches by `python -m tune.search ... --dry-run --json`,
each in a process of its own: what they find wrong, they have said in one line, and exit code 2 is passed on.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.site import Site
from nulsq.config import Recipe, command_line
from nulsq.errors import InputError
from nulsq.run.directory import path_of


class Refused(Exception):
    """The check has said what is wrong; its exit code."""


@dataclass(frozen=True)
class Work:
    """One thing to launch.

    Attributes:
        verb: train, search or array.
        file, rest: the recipe or search, and the settings and options behind it, as they were given.
        directory: of the run or search.
        data: prepared data set that it reads.
        name: what the job is called.
        plan: of a search: what `tune.search --dry-run --json` says.
    """

    verb: str
    file: str
    rest: list[str]
    directory: Path
    data: Path
    name: str
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return {"train": "nulsq.train", "search": "tune.search", "array": "tune.array"}[self.verb]

    @property
    def recipe(self) -> str:
        """File of the recipe: that of a run, or the one that a search's trials start from."""
        return self.plan.get("recipe", self.file)

    @property
    def trials(self) -> int:
        """Trials of a search, without the repeats of its finalists."""
        return len(self.plan["studies"]) * self.plan["trials"]

    def arguments(self, file: Path, recipe: Path) -> list[str]:
        """Of a job's command, whose copies of the file and of the recipe are there. Names are of what was copied."""
        if self.verb == "train":
            return [str(file), *self.rest]
        return [str(file), *self.rest, setting("recipe", recipe), setting("name", self.plan["name"])]


def look(verb: str, file: str, rest: list[str], ranks: int, *, files: bool = True) -> Work:
    """Check it and say what it is. `ranks`: processes of a run. With `files=False` the settings alone are checked:
    the data are somewhere else.

    Raises InputError, or Refused where the check's own process has said what is wrong.
    """
    if verb == "train":
        recipe = recipe_of([file, *rest])
        if files:
            # Nodes have GPUs that this machine may not have.
            checked(["-m", "nulsq.train", file, *rest, "run.device=cpu", f"--dry-run={ranks}"])
        directory = path_of(recipe)
        return Work(verb, file, rest, directory, Path(recipe.data.path), job_name(directory.name))
    printed = checked(["-m", "tune.search", file, *[word for word in rest if word != "--dry-run"], "--dry-run",
                        "--json"])
    plan = json.loads(printed)
    directory = Path(plan["directory"])
    return Work(verb, file, rest, directory, Path(plan["data"]), job_name(directory.name), plan)


def recipe_of(words: list[str]) -> Recipe:
    """The recipe that `python -m nulsq.train` makes of these words. Raises InputError for what it would not take."""
    made = command_line.parser("python -m nulsq.train", "")
    made.add_argument("--no-test", action="store_true")
    return command_line.parse(made, words)[1]


def check_fits(plan: dict[str, Any], site: Site) -> None:
    """Raises InputError where no node of the site could hold a process of a search's trials."""
    for name in ("gpus", "cpus"):
        if plan[name] > getattr(site, name):
            raise InputError(f"{name} = {plan[name]:g} for each process of a trial, but a node of this site has {name} "
                             f"= {getattr(site, name)}: fewer {name} in the search, or --at {name}=N")
    if site.gpus and not plan["gpus"]:
        raise InputError(f"gpus = {site.gpus} on each node of this site, but the search's trials use none: gpus=1, "
                         "or a fraction, in the search, or --at gpus=0")


def setting(key: str, value: object) -> str:
    """KEY=VALUE for a command line, the value read as the text that it is."""
    return f"{key}={json.dumps(str(value))}"


def job_name(name: str) -> str:
    """A name that every queue takes: what is no letter, digit, dot, dash or underscore becomes a dash."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:100] or "nulsq"


def checked(arguments: list[str]) -> str:
    """What Python prints with these arguments. Raises Refused where it says what is wrong."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Refused(done.returncode)
    return done.stdout


def check_plain(directory: Path) -> None:
    """Raises InputError for a folder whose name a batch system's log file, or a path of Python's, could not have."""
    if re.search(r"[\n\r\\\0:]", str(directory.resolve())):
        raise InputError(f"{str(directory)!r}: no line breaks, backslashes or colons in the folder of a job")
