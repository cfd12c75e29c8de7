"""A function in a process of its own: what it imports and allocates is gone with it."""

import importlib
import multiprocessing
import signal
import sys
from typing import Any


def apart(module: str, name: str, *arguments: Any) -> Any:
    """What `module.name(*arguments)` returns or raises, called in a process of its own.

    A search waits for its trials for days, and torch, with which networks are checked, would keep 0.3 GB of memory
    meanwhile. Where torch is loaded already nothing is to be saved, and the function is called right here. What it
    prints goes to stderr: a program may be reading stdout.
    """
    if "torch" in sys.modules:
        return getattr(importlib.import_module(module), name)(*arguments)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, module, name, arguments))
    process.start()
    theirs.close()
    try:
        worked, found = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {module}.{name} ended with exit code {process.exitcode}") from None
    finally:
        process.kill()  # it has answered, or nobody waits for its answer any more
        process.join()
    if not worked:
        raise found
    return found


def _call(answer, module, name, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; it is the other process that ends this one
    sys.stdout = sys.stderr
    try:
        answer.send((True, getattr(importlib.import_module(module), name)(*arguments)))
    except Exception as error:
        answer.send((False, error))
