"""Asking a run to save, or to save and stop; what is asked, all ranks agree on. Only a `main()` installs handlers.

    signals SIGTERM, SIGINT, SIGUSR1     save and stop
    a file RUN/save (touch RUN/save)     save and go on; the file is removed
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nulsq.distributed import Ranks

INTERVAL = 8  # steps between two agreements of several ranks, each of which costs a collective
SAME_WORD = 5.0  # seconds: Slurm signals every process of a job, torchrun passes the same signal on to its ranks
PRESSED_AGAIN = 1.0  # the same for Ctrl-C: whoever presses it twice means it
NOTHING, SAVE, STOP = range(3)
SAVE_FILE = "save"


class Stopped(Exception):
    """Out of an evaluation that was asked to stop, on every rank at the same batch."""


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGTERM, SIGINT or SIGUSR1 asks to save and stop; one that comes later acts as usual.

    Gives the `stop` that `train` polls. Works in the main thread only, as signals do.
    """
    asked = []

    def ask(number, frame):
        if asked and time.monotonic() - asked[0] > (PRESSED_AGAIN if number == signal.SIGINT else SAME_WORD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked.append(time.monotonic())

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Asked:
    """What a run is asked for. Every rank gets the same answer if all ask at the same counts."""

    def __init__(self, stop: Callable[[], bool] | None, ranks: Ranks, run: Path):
        self.stop, self.ranks, self.file = stop, ranks, run / SAVE_FILE

    def __call__(self, count: int) -> int:
        """NOTHING, SAVE or STOP after step number `count`."""
        agreed = count % INTERVAL == 0
        if self.ranks.size > 1 and not agreed:
            return NOTHING
        own = STOP if self._stop() else NOTHING
        if own == NOTHING and agreed and self.ranks.is_first and self.file.exists():
            own = SAVE
        return self.ranks.max(own)

    def stop_evaluation(self, count: int) -> None:
        """Raises Stopped where batch number `count` of an evaluation is to be the last."""
        asked = self.ranks.size == 1 or count % INTERVAL == 0
        if asked and self.ranks.any(self._stop()):
            raise Stopped

    def answered(self) -> None:
        """What was asked for is saved."""
        self.file.unlink(missing_ok=True)

    def _stop(self):
        return self.stop is not None and self.stop()
