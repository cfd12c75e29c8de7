"""Compiling the network of a training step: paid once a machine, and never the end of a run.

What torch.compile makes is kept in a folder (`$TORCHINDUCTOR_CACHE_DIR`, else torch's own, one for each user), so the
next process with the same network, method, bits and batch, another trial of a search say, loads it instead of compiling
again. Where nothing can be compiled the run goes on without, with one warning.
"""

import operator
import warnings
from pathlib import Path

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils.checkpoint import CheckpointPolicy

from nulsq.quant.op import inline_forward

BEHIND = torch.ops.nulsq.gradients_behind.default  # behind a batch norm
GRADIENTS = (torch.ops.nulsq.gradients.default, BEHIND)


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` compiled, sharing its parameters; `model` itself, with a warning, where that is impossible."""
    if reason := why_not(device):
        warnings.warn(f"run.compile: torch.compile does not work here, the network runs without it (same recipe, "
                      f"slower): {reason}", stacklevel=2)
        return model
    inline_forward()
    return torch.compile(model, options={"joint_custom_pre_pass": _InputsMadeAgain()})


class _Pass(CustomGraphPass):
    """Part of the key under which compiled graphs are kept: they are made again when this file changes, or one that
    says what the operation's nodes mean. To torch an operator is its name."""

    def uuid(self) -> bytes:
        operation = Path(__file__).parents[1] / "quant" / "op"
        return get_hash_for_files((__file__, *map(str, sorted(operation.rglob("*.py")))))


class _InputsMadeAgain(_Pass):
    """What a quantizer takes is not kept for backward but made again there, where that is a matter of elements.

    The partition keeps it otherwise, beside what the operation before took and what the convolution takes: three
    tensors of an activation's size where a float network keeps two. Forward then never writes it either. Where two
    convolutions read one activation, each through a quantizer of its own, what one of them takes (the one that backward
    meets later) is made again, too; also where the quantizers do a batch norm's work, and take what a convolution gave.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        met = set()
        for node in graph.nodes:  # in order
            if node.target not in GRADIENTS:
                continue
            source, taken = node.args[0], _convolved(node.args[1])
            if node.target is BEHIND:
                again = {taken} if taken is not None and taken.target is torch.ops.nulsq.quantize.default else set()
            elif _pointwise(source):  # else dear to make again
                source.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                again = _between(source, taken)  # or the comparisons are kept in its place
            else:
                continue
            for each in again if source in met else ():
                each.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            met.add(source)


def _pointwise(node: torch.fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _between(source: torch.fx.Node, taken: torch.fx.Node | None) -> set[torch.fx.Node]:
    """`taken` and what it is made of, element by element, from `source`."""
    found, left = set(), [taken]
    while left:
        node = left.pop()
        if node is None or node is source or not _pointwise(node):
            continue
        if node not in found and statically_known_true(sym_eq(node.meta["val"].shape, source.meta["val"].shape)):
            found.add(node)
            left += node.all_input_nodes
    return found


def _convolved(gradient: torch.fx.Node) -> torch.fx.Node | None:
    """What the convolution took that this is the input's gradient of; None where it is another operation's."""
    if gradient.target is not operator.getitem or gradient.args[1] != 0:
        return None
    found = gradient.args[0]
    return found.args[1] if found.target is torch.ops.aten.convolution_backward.default else None


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
