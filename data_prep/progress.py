"""Progress of a step that takes minutes or hours: a bar on a terminal, otherwise a few plain lines for a log file.

    for path in tracked(paths, "reading", len(paths)): ...

    reading: 0 of 1,331,167
    reading: 1% (14,304 of 1,331,167), 30s, 46m02s left
    reading: 6% (80,864 of 1,331,167), 2m50s, 43m42s left
    ...
    reading: 1,331,167 of 1,331,167, 46m32s

Both go to stderr. The first line with a forecast comes after 30 seconds, each further one when another 5 % is done and
30 seconds have passed. So a step of a few seconds writes two lines and the longest one 23.
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from nulsq.text import duration

INTERVAL = 30.0  # seconds between two lines, at least
SHARE = 0.05  # of the work between two lines, at least

Item = TypeVar("Item")


def on_terminal() -> bool:
    return sys.stderr.isatty()


class Progress(Protocol):
    """What FFCV's writer calls of a tqdm bar, so that all of these can take the place of one."""

    def update(self, count: int) -> object:
        """Count finished items."""

    def close(self) -> None:
        """End the bar, or print how much was done in which time."""


class ProgressLines:
    """Progress as plain lines."""

    def __init__(self, description: str, total: int, clock: Callable[[], float] = time.monotonic):
        self.description, self.total, self.clock = description, total, clock
        self.done, self.start = 0, clock()
        self.next_time, self.next_share = self.start + INTERVAL, 0.0
        self._print(f"{self.done:,} of {total:,}")

    def update(self, count: int) -> None:
        self.done += count
        now, share = self.clock(), self.done / self.total
        if self.done < self.total and now >= self.next_time and share >= self.next_share:
            elapsed = now - self.start
            self._print(f"{share:.0%} ({self.done:,} of {self.total:,}), {duration(elapsed)}, "
                        f"{duration(elapsed * (1 / share - 1))} left")
            self.next_time, self.next_share = now + INTERVAL, share + SHARE

    def close(self) -> None:
        self._print(f"{self.done:,} of {self.total:,}, {duration(self.clock() - self.start)}")

    def _print(self, text: str) -> None:
        print(f"{self.description}: {text}", file=sys.stderr, flush=True)


def progress(description: str, total: int) -> Progress:
    """A tqdm bar on a terminal, otherwise `ProgressLines`."""
    if on_terminal():
        from tqdm import tqdm
        return tqdm(desc=description, total=total)
    return ProgressLines(description, total)


def tracked(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The items, `total` of them, with progress."""
    with contextlib.closing(progress(description, total)) as shown:
        for item in items:
            yield item
            shown.update(1)


@contextlib.contextmanager
def without_foreign_bars() -> Iterator[None]:
    """Drop what other libraries write to stderr, if it is not a terminal; errors still come as exceptions.

    For downloads by torchvision, whose tqdm bar has no switch. (tqdm reads TQDM_DISABLE when it is imported, which has
    happened by then.)
    """
    if on_terminal():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
