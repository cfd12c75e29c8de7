"""A function of device tensors as a CUDA graph: recorded once, then replayed as one launch.

A step of a small network is many hundred kernels of some microseconds each. Python and torch hand them to a GPU more
slowly than it computes them; a graph is handed over at once.

A recording repeats the same kernels on the same memory. So what changes from call to call are the arguments, tensors or
numbers, and what the function finds in tensors that stay in their place; it must not read a number of the device, and
what it returns is overwritten by the next call. Random numbers follow torch's seed, as in a plain call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Value = Tensor | float | None


def on_device(values: tuple[Value, ...], device: torch.device) -> list[Tensor | None]:
    """The arguments as a recorded function takes them: numbers as float32 tensors []."""
    return [value if value is None or isinstance(value, Tensor) else torch.full((), float(value), device=device)
            for value in values]


def kind(values: tuple[Value, ...]) -> list[tuple | type]:
    """What a recording holds for: shape, type and memory order of tensors, and which arguments are None."""
    return [(value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else type(value)
            for value in values]


def warmed_up(function: Callable, values: tuple[Value, ...], device: torch.device) -> Any:
    """A plain call on a stream of its own, as torch asks for before a recording: libraries choose their kernels,
    optimizers make their state."""
    return WARM_UPS[device.type](function, on_device(values, device))


class Recording:
    """`function` as it does with arguments of the kind of `values`. Making it computes nothing."""

    def __init__(self, function: Callable, values: tuple[Value, ...], device: torch.device):
        self.arguments = [value if value is None else value.clone() for value in on_device(values, device)]
        self.replay, self.result = RECORDERS[device.type](function, self.arguments)

    def __call__(self, *values: Value) -> Any:
        for argument, value in zip(self.arguments, values, strict=True):
            if isinstance(value, Tensor):
                argument.copy_(value, non_blocking=True)
            elif value is not None:
                argument.fill_(value)
        self.replay()
        return self.result


def _on_side_stream(function, arguments):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    return result


def _record(function, arguments):
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
            result = function(*arguments)
    except RuntimeError as error:
        cause = error.__context__ or error  # ending a recording that has failed fails, too
        raise RuntimeError(f"run.cuda_graph: a step of this network cannot be recorded ({cause}); "
                           "run.cuda_graph=false runs it") from cause
    return graph.replay, result


# By kind of device. (function, arguments) -> what it returns; -> what replays it, and what it returns each time.
WARM_UPS = {"cuda": _on_side_stream}
RECORDERS = {"cuda": _record}
