"""The ranks of a run: this process's rank, how many there are, its device, and what they do together.

The code that creates the process group destroys it. Ray Train's workers, and a program that trains and then evaluates,
have created one before `train` is called: `join_ranks` uses it and leaves it alone. Under torchrun or Slurm it is
created from the environment. A process on its own is the only rank.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nulsq.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run. All methods but `is_first` are collective: every rank calls them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        values = torch.tensor([value], device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values.item())

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, function: Callable[[], T]) -> T:
        """Call the function on rank 0 alone; its result, or its exception, reaches every rank."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def first_then_all(self, function: Callable[[], T]) -> T:
        """Call the function on rank 0, then on every rank: rank 0 downloads a file, the others find it in the cache."""
        if self.size > 1 and dist.is_initialized():  # a dry run asks about ranks that do not exist
            self.on_first(lambda: function() and None)
        return function()

    def data_parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks; the model itself where there is one rank."""
        if self.size == 1:
            return model
        with warnings.catch_warnings():
            # torch 2.15 deprecates broadcast_buffers for a name that 2.11 does not have
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False,
                                           device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """The `Ranks` of this process. `device` is auto, cpu or cuda; several ranks on a node take cuda:LOCAL_RANK.

    Raises InputError where a CUDA device is asked for and torch finds none.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("run.device = cuda, but torch finds no CUDA device; allowed here: auto, cpu")
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own)
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), own)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size(), own)
            dist.barrier()  # a rank that leaves early closes connections that the others still use
        finally:
            # A DistributedDataParallel that waits for the garbage collector holds the group's threads. If they are
            # freed at the interpreter's end, they abort the process ("terminate called without an active exception").
            gc.collect()
            dist.destroy_process_group()
    else:
        yield Ranks(0, 1, own)
