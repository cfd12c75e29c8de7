"""Asking a run to stop: a flag that signals set, and that all ranks agree on. Only a `main()` installs handlers."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nulsq.world import World

INTERVAL = 8  # steps between two agreements of several ranks: each costs a collective


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGTERM, SIGINT or SIGUSR1 asks to save and stop; a second one acts as usual.

    Gives the `stop` that `train` polls. Works in the main thread only, as signals do.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(stop: Callable[[], bool] | None, here: World, step: int) -> bool:
    """Whether any rank was asked to stop; every rank gets the same answer at the same step."""
    if stop is None:
        return False
    if here.size == 1:
        return stop()
    return step % INTERVAL == 0 and here.any(stop())
