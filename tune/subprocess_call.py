"""Call a function in a child process, so that what it imports and allocates is freed when it returns."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Result = TypeVar("Result")
GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def run_in_subprocess(function: Callable[..., Result], *args: Any) -> Result:
    """Return `function(*args)`, called in a child process.

    A search waits for its trials for days. Its process checks networks with torch only once, and torch would hold
    0.3 GB for all that time. Where torch is loaded already nothing would be saved, and the function is called in this
    process.

    `function` is a module's function, importable by name. It must import torch in its body, because this process
    imports the module too. What it prints goes to stderr, because another program may read this process's stdout.

    Raises what the function raises, and RuntimeError where the child dies.
    """
    if "torch" in sys.modules:
        with contextlib.redirect_stdout(sys.stderr):
            return function(*args)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_initialize) as executor:
        future = executor.submit(_call, function, args)
        (child,) = set(multiprocessing.active_children()) - others
        try:
            return future.result()
        except BrokenProcessPool:
            pass  # the child's exit code is known once the executor has shut down
        except BaseException:
            if not future.done():  # this process was interrupted
                _signal(child, signal.SIGTERM)
                if wait([future], GRACE).not_done:
                    _signal(child, signal.SIGKILL)
            raise
    raise RuntimeError(f"the process that called {function.__module__}.{function.__qualname__} ended with exit code "
                       f"{child.exitcode}")


def _initialize() -> None:
    """Set up the child process."""
    # With a session of its own the child does not get Ctrl-C from the terminal: the parent gets it, and ends the child
    # and every process that the child has started.
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `finally` blocks remove temporary files
    os.dup2(2, 1)


def _call(function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    try:
        return function(*args)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # its __init__ takes other arguments than `error.args`, for example
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


def _signal(child: BaseProcess, number: int) -> None:
    """Send a signal to the child and its descendants, or to the child alone where it has no session of its own yet."""
    assert child.pid is not None
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            os.kill(child.pid, number)
