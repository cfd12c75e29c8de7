"""What is counted rather than timed: synchronizations, graph breaks, compilations, bytes; and where the time goes."""

import warnings

import torch
import torch._dynamo.testing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host has to wait for: on a GPU each of them stops the queue.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique", "unique_", "equal.default",
         "repeat_interleave.Tensor", "bincount", "histc")


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in WAITS)
        return function(*args, **(kwargs or {}))


def synchronizations(run, device: str = "cpu") -> int:
    """How often a call makes the host wait for a device: on a GPU counted by torch, on the CPU by the operations."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in seen)
    with Waits() as waits:
        run()
    return waits.count


def peak_bytes(run, device: str = "cpu") -> int:
    """Most bytes that are allocated at one time in a call, above what was there before it."""
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
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def graph_breaks(model: nn.Module, images: torch.Tensor) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compile(model, backend="aot_eager")(images)
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def compilations(quantizer: nn.Module, device: str = "cpu") -> int:
    """Graphs that one quantizer is compiled to when it meets 14 activation shapes, none like another."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    quick = torch.compile(quantizer, backend=graphs)
    folded = getattr(quantizer, "batch_norm", ())
    channels = folded[0].num_features if folded else 3
    for size in range(2, 16):
        x = torch.randn(size, channels, size + 1, size + 2, device=device, requires_grad=True)
        quick(x).sum().backward()
    return graphs.frame_count


def operations(run, times: int = 6) -> dict[str, float]:
    """Milliseconds a call that each operation takes by itself, by torch.profiler; the longest first."""
    for _ in range(times):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(times):
            run()
    found = {event.key: event.self_cpu_time_total / 1e3 / times for event in profile.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
