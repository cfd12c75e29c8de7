"""torch.compile for the network of a training step.

Compiled code is kept in a folder (`$TORCHINDUCTOR_CACHE_DIR`, else torch's own, one for each user). The next process
with the same network, method, bits and batch, for example another trial of a search, loads it instead of compiling
again. On a machine that cannot compile, the run continues without it after one warning.
"""

import operator
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils.checkpoint import CheckpointPolicy

from nulsq.quant.op import inline_forward

GRADIENTS = torch.ops.nulsq.gradients.default
GRADIENTS_AFTER_NORM = torch.ops.nulsq.gradients_after_norm.default


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` compiled, sharing its parameters; `model` itself, with a warning, where that is impossible."""
    if reason := why_not(device):
        warnings.warn(f"run.compile: torch.compile does not work here, the network runs without it (same recipe, "
                      f"slower): {reason}", stacklevel=2)
        return model
    inline_forward()
    return cast(nn.Module, torch.compile(model, options={"joint_custom_pre_pass": _RecomputeInputs()}))


class _RecomputeInputs(CustomGraphPass):
    """Recomputes the inputs of quantizers in backward instead of keeping them, where that takes elementwise operations.

    Otherwise the partitioner keeps such an input, next to the input of the operation before it and the input of the
    convolution after it: three tensors of an activation's size, where a float network keeps two. Forward then need not
    write the input at all. If two convolutions read one activation through quantizers of their own, the quantized
    input of one of them (the one that backward reaches later) is recomputed too. After a batch norm that the quantizer
    includes, the quantizer's input is a convolution's output and is kept; only the second quantized input is
    recomputed.

    CustomGraphPass and the option joint_custom_pre_pass are private to Inductor. The public selective checkpointing of
    `torch.utils.checkpoint` decides by operator within a region, not by which operation reads a tensor.
    """

    def uuid(self) -> bytes:
        """Part of the key of compiled graphs: they are compiled again if this file or one of the operation's changes.

        To torch an operator is only its name.
        """
        operation = Path(__file__).parents[1] / "quant" / "op"
        return get_hash_for_files((__file__, *map(str, sorted(operation.rglob("*.py")))))

    def __call__(self, graph: torch.fx.Graph) -> None:
        seen: set[Node] = set()
        for node in graph.nodes:  # in order of execution
            if node.target not in (GRADIENTS, GRADIENTS_AFTER_NORM):
                continue
            source, convolution_input = _argument(node, 0), _convolution_input(_argument(node, 1))
            recomputed: set[Node] = set()
            if node.target is GRADIENTS_AFTER_NORM:
                if convolution_input is not None and convolution_input.target is torch.ops.nulsq.quantize.default:
                    recomputed = {convolution_input}
            elif _is_pointwise(source):  # anything else is expensive to recompute
                source.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                recomputed = _between(source, convolution_input)  # or the comparisons are kept instead
            else:
                continue
            if source in seen:
                for recomputed_node in recomputed:
                    recomputed_node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            seen.add(source)


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _between(source: Node, target: Node | None) -> set[Node]:
    """`target` and the elementwise operations on tensors of source's shape that lead to it from `source`."""
    nodes: set[Node] = set()
    remaining = [target]
    while remaining:
        node = remaining.pop()
        if node is None or node is source or not _is_pointwise(node):
            continue
        if node not in nodes and statically_known_true(sym_eq(node.meta["val"].shape, source.meta["val"].shape)):
            nodes.add(node)
            remaining += node.all_input_nodes
    return nodes


def _convolution_input(gradient: Node) -> Node | None:
    """The input of the convolution whose input gradient this is; None if it comes from another operation."""
    if gradient.target is not operator.getitem or gradient.args[1] != 0:
        return None
    backward = _argument(gradient, 0)
    return _argument(backward, 1) if backward.target is torch.ops.aten.convolution_backward.default else None


def _argument(node: Node, position: int) -> Node:
    argument = node.args[position]
    assert isinstance(argument, Node)
    return argument


def why_not(device: torch.device) -> str:
    """The reason why torch.compile does not work for this device; "" if it works.

    Compiles one addition. Looking for a compiler by name is not enough, since headers can be missing too, and a failure
    in the first training step would come after half of the step.
    """
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        torch.compile(add)(torch.zeros(2, device=device))
    except Exception as error:  # parts of the compiler raise their own types
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]
    return ""
