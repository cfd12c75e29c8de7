"""What a user's input can do wrong, told in one line. Commands print it and exit with code 2."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable


class InputError(ValueError):
    """A recipe, file or argument that cannot be used. The message says what, where, and what is allowed."""


def require(module: str, extra: str):
    """Import an optional dependency, or say which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise missing(error.name, extra) from None


def missing(module: str, extra: str) -> InputError:
    return InputError(f"this needs {module}, which is not installed: pip install 'nulsq[{extra}]'")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the near miss, and leave by `exit_on_input_error`."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        word = next((word for word in message.split() if word.startswith("--")), "")
        near = difflib.get_close_matches(word, self._option_string_actions, 1, 0.6) if "unrecognized" in message else []
        hint = f". Did you mean {near[0]}?" if near else ""
        raise InputError(f"{message}{hint} (see {self.prog} --help)")


def exit_on_input_error(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a command's main: an InputError becomes one line on stderr and exit code 2."""
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    wrapped.__doc__ = main.__doc__
    return wrapped
