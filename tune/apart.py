"""A function in a process of its own: what it imports and allocates is gone with it."""

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from typing import Any

from nulsq.errors import InputError


def apart(module: str, name: str, *arguments: Any) -> Any:
    """What `module.name(*arguments)` returns or raises, called in a process of its own.

    A search waits for its trials for days, and torch, with which networks are checked, would keep 0.3 GB of memory
    meanwhile. Where torch is loaded already nothing is to be saved, and the function is called right here. What it
    prints goes to stderr: a program may be reading stdout.

    Raises whatever the function does, and RuntimeError where its process dies.
    """
    if "torch" in sys.modules:
        with contextlib.redirect_stdout(sys.stderr):
            return getattr(importlib.import_module(module), name)(*arguments)
    code = f"import sys; sys.path[:] = {sys.path!r}; from tune.apart import answer; answer()"
    # In a session of its own: Ctrl-C is for this process, which then ends the other one and all that it has started.
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               start_new_session=True)
    try:
        written, _ = process.communicate(pickle.dumps((module, name, arguments)))
    finally:
        _end(process)
    if not written:
        raise RuntimeError(f"the process of {module}.{name} ended with exit code {process.returncode}")
    worked, found = pickle.loads(written)
    if not worked:
        raise found
    return found


def answer() -> None:
    """The other side: read what is to be called, call it, write what came of it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with temporary files removed
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, name, arguments = pickle.load(sys.stdin.buffer)
    try:
        found = True, getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        found = False, _portable(error)
    with out:
        pickle.dump(found, out)


def _portable(error: Exception) -> Exception:
    """An error as another process can raise it, with its traceback where nobody expected it."""
    if isinstance(error, InputError):
        return error
    error.add_note(f"in a process of its own:\n{''.join(traceback.format_exception(error))}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # one that takes other arguments than it has, say
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.add_note(error.__notes__[-1])
        return told


def _end(process: subprocess.Popen) -> None:
    """Whatever is left of it: nothing where it has answered."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
