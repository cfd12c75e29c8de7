"""Exchanges results between the ranks of a job, for checks that have to end even if something hangs.

The ranks use torchrun's key-value store. It needs no process group, so results arrive without the network that is under
test. Each rank runs its checks in a thread with a time limit; ranks that do not answer in time are named.
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

START_SECONDS = 300.0  # until all ranks have started: the first import from a cold network file system is slow
SLACK = 15.0  # seconds that ranks may lag behind each other
THREAD = "preflight-check"  # name of the threads that run checks


class RankTimeout(Exception):
    """Ranks that did not answer in time. The message names them."""


class RankStore:
    """The ranks of a job and their shared key-value store.

    Attributes:
        rank, size: this process's rank, and the number of ranks.
        node: name of this process's node.
        nodes: the node of each rank.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.store: Any = None  # a torch.distributed.Store, for more than one rank
        self.node = os.environ.get("SLURMD_NODENAME") or platform.node()
        self.nodes: list[str] = []

    def connect(self) -> None:
        """Wait for all ranks. Raises RankTimeout where some do not start."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
            try:
                self.store, self.rank, self.size = next(dist.rendezvous(
                    "env://", timeout=timedelta(seconds=START_SECONDS)))
            except (RuntimeError, ValueError) as error:
                raise RankTimeout(f"the ranks' store cannot be reached: {one_line(error)}") from None
        self.nodes = self.all_gather("node", self.node, START_SECONDS)

    @property
    def first_of_node(self) -> bool:
        return self.nodes.index(self.node) == self.rank

    def gather(self, key: str, function: Callable[..., dict[str, Any]], *arguments: Any, seconds: float) -> list[Any]:
        """Call the function on every rank with `run_with_timeout`; all results on every rank, in the order of ranks.

        Raises RankTimeout like `all_gather`.
        """
        return self.all_gather(key, run_with_timeout(seconds, function, *arguments), seconds)

    def all_gather(self, key: str, value: Any, seconds: float) -> list[Any]:
        """The values of all ranks, in the order of ranks, on every rank. A value is JSON data.

        Raises RankTimeout where some ranks give none in time.
        """
        if self.size == 1:
            return [value]
        try:
            self.store.set(f"{key}/{self.rank}", json.dumps(value))
            if self.rank == 0:
                self.store.set(f"{key}/all", json.dumps(self._collect(key, time.monotonic() + seconds + SLACK)))
            self.store.wait([f"{key}/all"], timedelta(seconds=seconds + 2 * SLACK))
            values = json.loads(self.store.get(f"{key}/all"))
        except RuntimeError as error:
            raise RankTimeout(f"rank 0 or the store in its process is gone ({key}): {one_line(error)}") from None
        missing = [self.label(rank) for rank, value in enumerate(values) if value is None]
        if missing:
            raise RankTimeout(f"no answer from {', '.join(missing)} within {seconds + SLACK:g} s ({key})")
        return values

    def _collect(self, key: str, deadline: float) -> list[Any]:
        """The values of all ranks that arrive in time; None for the others. Called on rank 0."""
        values = []
        for rank in range(self.size):
            try:
                self.store.wait([f"{key}/{rank}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
                values.append(json.loads(self.store.get(f"{key}/{rank}")))
            except RuntimeError:
                values.append(None)
        return values

    def disconnect(self) -> None:
        """Wait until rank 0 is done: torchrun ends all ranks as soon as one has failed."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):  # the store is gone: nothing left to wait for
                if self.rank == 0:
                    self.store.set("end", "")
                self.store.wait(["end"], timedelta(seconds=SLACK))

    def by_node(self, results: list[Any], text: Callable[[Any], str | None]) -> str:
        """The ranks' results as text: each text once, with its nodes. Results whose text is None are left out."""
        return _grouped((node, text(result)) for node, result in zip(self.nodes, results, strict=True))

    def errors(self, results: list[Any]) -> str:
        """The errors in the results, with their ranks and nodes; empty where there is none."""
        return _grouped((self.label(rank), result.get("error")) for rank, result in enumerate(results))

    def label(self, rank: int) -> str:
        return f"rank {rank} ({self.nodes[rank]})" if self.nodes else f"rank {rank}"


def run_with_timeout(seconds: float, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result, or {"error": text} where it raises, or has not returned within `seconds`.

    It runs in a thread, which cannot be ended: see `is_hanging` and `exit_process`.
    """
    result: dict[str, Any] = {"error": f"no answer within {seconds:g} s"}

    def run() -> None:
        nonlocal result
        try:
            returned = function(*arguments)
        except Exception as error:
            returned = {"error": one_line(error)}
        result = returned

    thread = threading.Thread(target=run, daemon=True, name=THREAD)
    thread.start()
    thread.join(seconds)
    return result


def is_hanging() -> bool:
    """Whether a function that `run_with_timeout` called has not returned yet."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def exit_process(code: int) -> NoReturn:
    """End the process, also where a normal exit would wait for a thread that hangs in a library."""
    if is_hanging():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def one_line(error: BaseException) -> str:
    """An error in one line of at most 400 characters."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _grouped(texts: Iterable[tuple[str, str | None]]) -> str:
    """(place, text) pairs as "TEXT on PLACE, PLACE; TEXT on PLACE"."""
    places: dict[str, list[str]] = {}
    for place, text in texts:
        if text is not None and place not in places.setdefault(text, []):
            places[text].append(place)
    return "; ".join(f"{text} on {', '.join(places[text])}" for text in places)
