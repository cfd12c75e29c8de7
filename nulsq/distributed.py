"""Where this process stands among the ranks of a run: it joins a process group, makes one, or is alone.

Whoever makes the group destroys it. Ray Train's workers, and a main that trains and then evaluates, have made one
before `train` is called: `world()` finds it and leaves it. Under torchrun or Slurm it is made from the environment.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nulsq.errors import InputError


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks have to ask equally often."""
        return bool(self.largest(int(flag)))

    def largest(self, value: int) -> int:
        """The largest of the ranks' values. All ranks have to ask equally often."""
        if self.size == 1:
            return value
        values = torch.tensor([value], device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order, on every rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Call the function on rank 0 alone; its result, or its error, reaches every rank."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def data_parallel(self, model: nn.Module) -> nn.Module:
        """The model as ranks step it together, their gradients averaged; the model itself where there is one rank."""
        if self.size == 1:
            return model
        with warnings.catch_warnings():
            # torch 2.15 announces another spelling of broadcast_buffers, which 2.11 does not have
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False,
                                           device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """The World of this process. `device` is auto, cpu or cuda; several ranks on a node take cuda:LOCAL_RANK."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("run.device = cuda, but torch sees no CUDA device; allowed here: auto, cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(chosen)
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size(), chosen)
            dist.barrier()  # a rank that leaves first closes connections that others still use
        finally:
            # A DistributedDataParallel that waits for the garbage collector holds the group's threads: freed at the
            # interpreter's end they abort the process ("terminate called without an active exception").
            gc.collect()
            dist.destroy_process_group()
    else:
        yield Ranks(0, 1, chosen)
