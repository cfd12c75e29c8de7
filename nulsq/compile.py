"""Compiling the network of a training step: paid once a machine, and never the end of a run.

What torch.compile makes is kept in a folder (`$TORCHINDUCTOR_CACHE_DIR`, else torch's own, one for each user), so the
next process with the same network, method, bits and batch, another trial of a search say, loads it instead of compiling
again. Where nothing can be compiled the run goes on without, with one warning.
"""

import warnings

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from nulsq.quant.op import inline_forward


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` compiled, sharing its parameters; `model` itself, with a warning, where that is impossible."""
    if reason := why_not(device):
        warnings.warn(f"run.compile: torch.compile does not work here, the network runs without it (same recipe, "
                      f"slower): {reason}", stacklevel=2)
        return model
    inline_forward()
    return torch.compile(model, options={"joint_custom_pre_pass": _InputsMadeAgain()})


class _InputsMadeAgain(CustomGraphPass):
    """What a quantizer takes (the batch norm's output) is not kept for backward but made again there.

    The partition keeps it otherwise, beside what the batch norm took and what the convolution takes: three tensors of
    an activation's size where a float network keeps two. Forward then never writes it either.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.nulsq.gradients.default):
            source = node.args[0]
            if torch.Tag.pointwise in getattr(source.target, "tags", ()):  # cheap to make again
                source.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def why_not(device: torch.device) -> str:
    """"" if torch.compile works for this device, else the reason.

    Found by compiling one addition. Asking for a compiler by name is not enough, since headers can be missing too; and
    a failure in the first step would come when half of it is done.
    """
    def add(x):
        return x + 1

    try:
        torch.compile(add)(torch.zeros(2, device=device))
    except Exception as error:  # whatever the compiler's parts raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]
    return ""
