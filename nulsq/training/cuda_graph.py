"""A function of device tensors as a CUDA graph: recorded once, then replayed with one launch.

A step of a small network is hundreds of kernels of a few microseconds each. Python and torch launch them more slowly
than a GPU computes them; a graph is launched as a whole.

A recording repeats the same kernels on the same memory. Per-step values are therefore arguments (tensors or numbers),
and everything else the function uses stays at its place in memory. The function must not read a number from the device,
and each call overwrites the result of the one before. Random numbers follow torch's seed, as in a plain call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Value = Tensor | float | None


def on_device(values: Sequence[Value], device: torch.device) -> list[Tensor | None]:
    """The arguments of a recorded function: numbers become float32 tensors []."""
    return [value if value is None or isinstance(value, Tensor) else torch.full((), float(value), device=device)
            for value in values]


def signature(values: Sequence[Value]) -> list[tuple | type]:
    """What the arguments of a recording must have in common: which are numbers or None, and for tensors their shape,
    type and memory order."""
    return [(value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else type(value)
            for value in values]


def warmed_up(function: Callable, values: Sequence[Value], device: torch.device) -> Any:
    """A plain call on a separate stream, which torch requires before a recording: libraries choose their kernels, and
    optimizers allocate their state."""
    return WARM_UPS[device.type](function, on_device(values, device))


class Recording:
    """Calls `function` by replaying it, for arguments with the same `signature` as `values`.

    Creating a recording computes nothing. Raises RuntimeError if the function cannot be recorded.
    """

    def __init__(self, function: Callable, values: Sequence[Value], device: torch.device):
        self.arguments = [value if value is None else value.clone() for value in on_device(values, device)]
        self.replay, self.result = RECORDERS[device.type](function, self.arguments)

    def __call__(self, *values: Value) -> Any:
        for argument, value in zip(self.arguments, values, strict=True):
            if argument is None:
                continue
            if isinstance(value, Tensor):
                argument.copy_(value, non_blocking=True)
            elif value is not None:
                argument.fill_(value)
        self.replay()
        return self.result


def _on_side_stream(function: Callable, arguments: list[Tensor | None]) -> Any:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    return result


def _record(function: Callable, arguments: list[Tensor | None]) -> tuple[Callable[[], None], Any]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
            result = function(*arguments)
    except RuntimeError as error:
        cause = error.__context__ or error  # the context manager's exit raises too after a failure
        raise RuntimeError(f"run.cuda_graph: a step of this network cannot be recorded ({cause}); "
                           "run.cuda_graph=false runs it") from cause
    return graph.replay, result


# By device type. A warm-up returns the function's result; a recorder returns the replay function and the result, which
# every replay overwrites.
WARM_UPS: dict[str, Callable[..., Any]] = {"cuda": _on_side_stream}
RECORDERS: dict[str, Callable[..., tuple[Callable[[], None], Any]]] = {"cuda": _record}
