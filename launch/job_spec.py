"""What is to be launched: a run, a search or an array of trials, checked before anything is started.

Recipes are checked by `python -m nulsq.train ... --dry-run`, searches by `python -m tune.search ... --dry-run --json`.
Each check is a process of its own, which prints what is wrong in one line; its exit code is passed on.
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


class CheckFailed(Exception):
    """A check in a process of its own has printed what is wrong.

    Attributes:
        exit_code: of that process.
    """

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class JobSpec:
    """One thing to launch.

    Attributes:
        verb: train, search or array.
        file, rest: the recipe or search, and the settings and options after it, as they were given.
        directory: of the run or search.
        data: prepared data set that it reads.
        name: of the job.
        plan: of a search: the output of `tune.search --dry-run --json`.
    """

    verb: str
    file: str
    rest: list[str]
    directory: Path
    data: Path
    name: str
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """File of the recipe: that of a run, or the one that a search's trials start from."""
        return self.plan.get("recipe", self.file)

    @property
    def trials(self) -> int:
        """Trials of a search, without the repeats of its finalists."""
        return len(self.plan["studies"]) * self.plan["trials"]

    def arguments(self, file: Path, recipe: Path) -> list[str]:
        """Arguments of the job's command. `file` and `recipe` are the copies that the job reads; a search keeps the
        name of its original file."""
        if self.verb == "train":
            return [str(file), *self.rest]
        return [str(file), *self.rest, setting("recipe", recipe), setting("name", self.plan["name"])]


def prepare(verb: str, file: str, rest: list[str], ranks: int, *, check_files: bool = True) -> JobSpec:
    """Check what is to be launched, and describe it.

    ranks: processes of a run. check_files: False checks only the settings of a run, because its data and weights are
    on another machine.

    Raises InputError, or CheckFailed where the check's own process has printed what is wrong.
    """
    if verb == "train":
        recipe = recipe_of([file, *rest])
        if check_files:
            # The nodes may have GPUs that this machine does not have.
            run_check(["-m", "nulsq.train", file, *rest, "run.device=cpu", f"--dry-run={ranks}"])
        directory = path_of(recipe)
        return JobSpec(verb, file, rest, directory, Path(recipe.data.path), job_name(directory.name))
    words = [word for word in rest if word != "--dry-run"]
    plan = json.loads(run_check(["-m", "tune.search", file, *words, "--dry-run", "--json"]))
    directory = Path(plan["directory"])
    return JobSpec(verb, file, rest, directory, Path(plan["data"]), job_name(directory.name), plan)


def recipe_of(words: list[str]) -> Recipe:
    """The recipe that `python -m nulsq.train` makes of its arguments. Raises InputError for arguments it rejects."""
    return command_line.parse(command_line.parser("python -m nulsq.train", ""), words)[1]


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
    """KEY="VALUE" for a command line. The quotes keep YAML from reading the text as a number or a list."""
    return f"{key}={json.dumps(str(value))}"


def job_name(name: str) -> str:
    """A name that every queue accepts: dashes replace all but letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:100] or "nulsq"


def run_check(arguments: list[str]) -> str:
    """Run Python with these arguments and return its output. Raises CheckFailed where it fails."""
    process = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise CheckFailed(process.returncode)
    return process.stdout


def check_plain(directory: Path) -> None:
    """Raises InputError for a folder whose path cannot be part of a log file's name or of PYTHONPATH."""
    if re.search(r"[\n\r\\\0:]", str(directory.resolve())):
        raise InputError(f"{str(directory)!r}: no line breaks, backslashes or colons in the folder of a job")
