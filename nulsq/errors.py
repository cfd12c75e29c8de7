"""What a user's input can do wrong, told in one line. Commands print it and exit with code 2."""

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
