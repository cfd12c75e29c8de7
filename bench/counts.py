"""Counts instead of times: synchronizations, graph breaks, compilations, bytes; and the time of each operation."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.testing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host has to wait for; on a GPU each of them waits for the whole queue.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique", "unique_", "equal.default",
         "repeat_interleave.Tensor", "bincount", "histc")


class Waits(TorchDispatchMode):
    """Counts the operations of WAITS that run inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(function) for name in WAITS)
        return function(*args, **(kwargs or {}))


def synchronizations(run: Callable[[], object], device: str = "cpu") -> int:
    """How often a call makes the host wait for the device. On a GPU torch counts; on the CPU `Waits` does."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)
    with Waits() as waits:
        run()
    return waits.count


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Peak of the bytes allocated during a call, in addition to those allocated before it."""
    for _ in range(2):
        run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def graph_breaks(model: nn.Module, images: torch.Tensor) -> int:
    """Graph breaks of a forward pass under torch.compile."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend="aot_eager")(images)
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def compilations(quantizer: nn.Module, device: str = "cpu") -> int:
    """Graphs that a quantizer is compiled to for 14 different activation shapes."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quantizer, backend=graphs)
    folded = getattr(quantizer, "batch_norm", ())
    channels = folded[0].num_features if folded else 3
    for size in range(2, 16):
        x = torch.randn(size, channels, size + 1, size + 2, device=device, requires_grad=True)
        compiled(x).sum().backward()
    return graphs.frame_count


def operations(run: Callable[[], object], times: int = 6) -> dict[str, float]:
    """Milliseconds per call that each operation takes by itself, by torch.profiler; the longest first."""
    for _ in range(times):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(times):
            run()
    milliseconds = {event.key: event.self_cpu_time_total / 1e3 / times for event in profile.key_averages()}
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))
