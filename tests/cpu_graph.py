"""A CPU substitute for a CUDA graph: records the operations of one call and repeats them on the same memory.

Like a graph it computes nothing while recording (changed memory is restored, and results hold NaN until the first
replay), does not allow reading a number, and does not repeat Python code between the operations. It cannot record
kernels that are called around torch's dispatcher, so quantizers have to use the form "reference".
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
        inputs = {address(tensor) for tensor in tensors((args, kwargs))}
        for tensor in tensors((args, kwargs)):
            if address(tensor) not in self.own | self.before.keys():
                self.before[address(tensor)] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        result = function(*args, **kwargs)
        self.own |= {address(tensor) for tensor in tensors(result)} - inputs
        self.calls.append((function, args, kwargs, result))  # references keep memory from being reused
        return result

    @torch.no_grad()
    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)
        for *_, result in self.calls:
            for tensor in tensors(result):
                if address(tensor) in self.own and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                if address(old) != address(new):
                    old.copy_(new)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.numel()]


def address(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(function, arguments):
    recorder, state = Recorder(), torch.get_rng_state()
    with recorder:
        result = function(*arguments)
    recorder.undo()
    torch.set_rng_state(state)
    return recorder.replay, result


def note(monkeypatch, device, record) -> list[str]:
    """Use `record` as the recorder of this kind of device. Returns a list that grows by the name of each function."""
    recorded = []

    def recorder(function, arguments):
        recorded.append(function.__name__)
        return record(function, arguments)

    monkeypatch.setitem(cuda_graph.RECORDERS, device, recorder)
    return recorded


@contextlib.contextmanager
def on_the_cpu(monkeypatch):
    """Allow run.cuda_graph on the CPU, with quantizers in a form that a recorder sees. Yields the names of recorded
    functions."""
    recorded = note(monkeypatch, "cpu", record)
    monkeypatch.setitem(cuda_graph.WARM_UPS, "cpu", lambda function, arguments: function(*arguments))
    monkeypatch.setattr(cpu, "moments", torch.ops.nulsq.moments)
    with force("reference"):
        yield recorded
