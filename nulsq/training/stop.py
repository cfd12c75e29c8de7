"""Requests to save a run, or to save and stop it. All ranks agree on each. Only a `main()` installs signal handlers.

    signals SIGTERM, SIGINT, SIGUSR1     save and stop
    a file RUN/save (touch RUN/save)     save and continue; the file is removed
"""

import enum
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nulsq.distributed import Ranks

INTERVAL = 8  # steps between two agreements of several ranks; each agreement is a collective call
DEBOUNCE = 5.0  # seconds: Slurm signals every process of a job, and torchrun forwards the same signal to its ranks
DEBOUNCE_CTRL_C = 1.0  # shorter: a second Ctrl-C is meant to end the process at once
SAVE_FILE = "save"


class Action(enum.IntEnum):
    """What a run should do after a step; where ranks differ, the largest counts."""

    NONE = 0
    SAVE = 1
    STOP = 2  # save, then stop


class Stopped(Exception):
    """Raised on every rank, at the same step or batch, where a run was asked to stop."""


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield the `stop` that `train` polls: True from the first SIGTERM, SIGINT or SIGUSR1 on.

    Duplicates of that signal are debounced; a later signal has its usual effect. Works in the main thread only.
    """
    received: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and time.monotonic() - received[0] > (DEBOUNCE_CTRL_C if number == signal.SIGINT else DEBOUNCE):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(time.monotonic())

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Polls `stop` and the file RUN/save. Every rank gets the same answer, if all poll at the same counts."""

    def __init__(self, stop: Callable[[], bool] | None, ranks: Ranks, run: Path):
        self.stop, self.ranks, self.file = stop, ranks, run / SAVE_FILE

    def poll(self, count: int) -> Action:
        """What to do after step number `count`."""
        agree = count % INTERVAL == 0
        if self.ranks.size > 1 and not agree:
            return Action.NONE
        own = Action.STOP if self._stop() else Action.NONE
        if own is Action.NONE and agree and self.ranks.is_first and self.file.exists():
            own = Action.SAVE
        return Action(self.ranks.max(own))

    def poll_evaluation(self, count: int) -> None:
        """Raise Stopped where a run was asked to stop. `count` is the number of the batch within the evaluation."""
        agree = self.ranks.size == 1 or count % INTERVAL == 0
        if agree and self.ranks.any(self._stop()):
            raise Stopped

    def remove_save_file(self) -> None:
        self.file.unlink(missing_ok=True)

    def _stop(self) -> bool:
        return self.stop is not None and self.stop()
