"""What a CUDA graph does, on the CPU: the operations of one call, repeated on the same memory.

Like a graph it computes nothing while recording (what was changed is put back, and what will be computed holds NaN
until then), refuses to read a number, and knows of no Python between the operations. What reaches kernels around
torch's dispatcher it does not see: quantizers have to take the form "reference".
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nulsq.quant.op import force
from nulsq.quant.op.cpu import kernel as cpu
from nulsq.training import cuda_graph


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.own, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is read while a graph is recorded")
        kwargs = kwargs or {}
        given = {place(tensor) for tensor in tensors((args, kwargs))}
        for tensor in tensors((args, kwargs)):
            if place(tensor) not in self.own | self.before.keys():
                self.before[place(tensor)] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        result = function(*args, **kwargs)
        self.own |= {place(tensor) for tensor in tensors(result)} - given
        self.calls.append((function, args, kwargs, result))  # keeps them, so that no memory is used twice
        return result

    @torch.no_grad()
    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)
        for *_, result in self.calls:
            for tensor in tensors(result):
                if place(tensor) in self.own and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                if place(old) != place(new):
                    old.copy_(new)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.numel()]


def place(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(function, arguments):
    recorder, state = Recorder(), torch.get_rng_state()
    with recorder:
        result = function(*arguments)
    recorder.undo()
    torch.set_rng_state(state)
    return recorder.replay, result


def note(monkeypatch, device, record) -> list[str]:
    """Let `record` do the recording on this kind of device; the names of the functions that are recorded."""
    recorded = []

    def noted(function, arguments):
        recorded.append(function.__name__)
        return record(function, arguments)

    monkeypatch.setitem(cuda_graph.RECORDERS, device, noted)
    return recorded


@contextlib.contextmanager
def on_the_cpu(monkeypatch):
    """Within it runs on the CPU may have run.cuda_graph, and their quantizers are seen by a recorder. Yields the names
    of the functions recorded."""
    recorded = note(monkeypatch, "cpu", record)
    monkeypatch.setitem(cuda_graph.WARM_UPS, "cpu", lambda function, arguments: function(*arguments))
    monkeypatch.setattr(cpu, "moments", torch.ops.nulsq.moments)
    with force("reference"):
        yield recorded
