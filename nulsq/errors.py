"""Errors for users, exit codes of all commands, and hints for misspelled names."""

import argparse
import difflib
import enum
import functools
import importlib
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """A recipe, file or argument that cannot be used. The message names the bad value and what is allowed."""


class ExitCode(enum.IntEnum):
    """Exit codes of every command. torchrun turns all but 0 into 1; a run's outcome.json keeps the difference."""

    FINISHED = 0
    FAILED = 1
    BAD_INPUT = 2
    DIVERGED = 3
    PREFLIGHT_FAILED = 4  # a node cannot run what was about to be launched
    VERIFICATION_FAILED = 5  # what was written is not what it should be
    FILES_SKIPPED = 6  # a data set was prepared without some of its files
    SAVED = 99  # interrupted and saved: start the same command again


def did_you_mean(word: object, allowed: Iterable[str], count: int = 1, cutoff: float = 0.4) -> str:
    """" Did you mean 'lsq'?" for the nearest allowed names, "" where nothing is near."""
    near = difflib.get_close_matches(str(word), list(allowed), count, cutoff)
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""


def require(module: str, extra: str):
    """Import an optional dependency. Raises InputError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise missing(error.name, extra) from None


def missing(module: str, extra: str) -> InputError:
    return InputError(f"this needs {module}, which is not installed: pip install 'nulsq[{extra}]'")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors of one line, with a hint for a misspelled option."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        option = next((word for word in message.split() if word.startswith("--")), "")
        hint = did_you_mean(option, self._option_string_actions, cutoff=0.6) if "unrecognized" in message else ""
        raise InputError(f"{message}{f'.{hint}' if hint else ''} (see {self.prog} --help)")


def exit_on_input_error(main: Callable[[list[str]], int]) -> Callable[..., int]:
    """Decorator of a command's main: an InputError becomes one line on stderr and exit code 2."""
    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return ExitCode.BAD_INPUT
    return wrapped
