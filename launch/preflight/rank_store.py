"""The ranks of a job, and what each has to say: for checks that have to end, whatever hangs.

They talk through torchrun's key-value store: it needs no process group, so an answer arrives without the network that
is under test. What a rank does, it does `within` a time, in a thread; who does not answer in time is named.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from nulsq.errors import InputError

GATHERING = 300.0  # seconds for all ranks to come: the first import on a cold network file system is slow
SLACK = 15.0  # seconds that ranks may lag behind each other
WATCHED = "within"


class Silent(Exception):
    """Ranks that did not answer."""


class Meeting:
    """The ranks of a job and what each has to say, through a key-value store that needs no process group."""

    def __init__(self):
        self.rank, self.size, self.store = 0, 1, None
        self.node = os.environ.get("SLURMD_NODENAME") or platform.node()
        self.nodes: list[str] = []

    def begin(self) -> None:
        """Wait for all ranks. Raises Silent where some do not come."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
            try:
                self.store, self.rank, self.size = next(dist.rendezvous(
                    "env://", timeout=timedelta(seconds=GATHERING)))
            except (RuntimeError, ValueError) as error:
                raise Silent(f"no store to meet at: {line_of(error)}") from None
        self.nodes = self.gather("node", self.node, GATHERING)

    @property
    def first_of_node(self) -> bool:
        return self.nodes.index(self.node) == self.rank

    def gather(self, what: str, value: Any, seconds: float) -> list[Any]:
        """Every rank's value, plain data, in their order, on every rank. Raises Silent where some give none in time."""
        if self.size == 1:
            return [value]
        try:
            self.store.set(f"{what}/{self.rank}", json.dumps(value))
            if self.rank == 0:
                self.store.set(f"{what}/all", json.dumps(self._collect(what, time.monotonic() + seconds + SLACK)))
            self.store.wait([f"{what}/all"], timedelta(seconds=seconds + 2 * SLACK))
            found = json.loads(self.store.get(f"{what}/all"))
        except RuntimeError as error:
            raise Silent(f"rank 0 or the store it answers in is gone ({what}): {line_of(error)}") from None
        missing = [self.named(rank) for rank, answer in enumerate(found) if answer is None]
        if missing:
            raise Silent(f"nothing from {', '.join(missing)} within {seconds + SLACK:g} s ({what})")
        return found

    def _collect(self, what, until):
        found = []
        for rank in range(self.size):
            try:
                self.store.wait([f"{what}/{rank}"], timedelta(seconds=max(1.0, until - time.monotonic())))
                found.append(json.loads(self.store.get(f"{what}/{rank}")))
            except RuntimeError:
                found.append(None)
        return found

    def look(self, what: str, function: Callable[..., Any], *arguments: Any, seconds: float) -> list[Any]:
        """What the function finds on every rank, as `within` has it there. Raises Silent like `gather`."""
        return self.gather(what, within(seconds, function, *arguments), seconds)

    def end(self) -> None:
        """Rank 0 says that it has done; the others wait for it: torchrun ends all ranks as soon as one has failed."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):  # it is over for who asks in vain
                if self.rank == 0:
                    self.store.set("end", "")
                self.store.wait(["end"], timedelta(seconds=SLACK))

    def where(self, found: list[Any], text: Callable[[Any], str | None]) -> str:
        """Findings as text: each once, with its nodes. What has the text None is left out."""
        return _grouped((node, text(each)) for node, each in zip(self.nodes, found, strict=True))

    def errors(self, found: list[Any]) -> str:
        """What went wrong, and on which ranks and nodes; empty where nothing did."""
        return _grouped((self.named(rank), each.get("error")) for rank, each in enumerate(found))

    def named(self, rank: int) -> str:
        return f"rank {rank} ({self.nodes[rank]})" if self.nodes else f"rank {rank}"


def within(seconds: float, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the function returns, or {"error": text} where it raises, or where it has not ended in so many seconds.

    It runs in a thread, which is left behind when its time is over: `hangs` tells, and `leave` ends the process then.
    """
    answer: dict[str, Any] = {"error": f"no answer within {seconds:g} s"}

    def run():
        nonlocal answer
        try:
            found = function(*arguments)
        except Exception as error:
            found = {"error": line_of(error)}
        answer = found

    thread = threading.Thread(target=run, daemon=True, name=WATCHED)
    thread.start()
    thread.join(seconds)
    return answer


def hangs() -> bool:
    """Whether something that was begun `within` a time still runs."""
    return any(thread.name == WATCHED for thread in threading.enumerate())


def leave(code: int) -> NoReturn:
    """End the process, also where a thread hangs in a library that a normal end would wait for."""
    if hangs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def line_of(error: BaseException) -> str:
    """An error in one line of at most 400 characters."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _grouped(found: Iterable[tuple[str, str | None]]) -> str:
    nodes: dict[str, list[str]] = {}
    for node, text in found:
        if text is not None and node not in nodes.setdefault(text, []):
            nodes[text].append(node)
    return "; ".join(f"{text} on {', '.join(each)}" for text, each in nodes.items())
