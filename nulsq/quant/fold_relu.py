"""fold_relu_(model): a ReLU whose output only quantized layers read becomes part of their quantizers.

Q(max(x, 0)) is one pass over x in each direction where ReLU and quantizer apart are two: the quantizer takes the place
of the ReLU that the float network has. Output and gradients stay the same, bit for bit (`Rule.relu`); parameters,
their names and the state dict stay as they are.

For a network that is calibrated and about to be trained. What reads the ReLU's output is found by torch.fx.
"""

from collections import Counter

from torch import fx, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import QUANTIZED
from nulsq.quant.step import quantizers_of


def fold_relu_(model: nn.Module) -> list[str]:
    """Put an Identity in place of every ReLU that can be folded, and tell its readers' quantizers. In place.

    That is a `nn.ReLU` called once in a forward pass (torchvision's residual blocks call theirs twice), read by
    quantized layers alone, each of them called once too, whose activation quantizer has the usual forward (MinMax
    measures its input, so it has not). An in-place ReLU must be alone in reading its input. A network that torch.fx
    cannot trace stays as it is.

    Returns the names of the folded ReLUs.
    """
    if not quantizers_of(model):
        return []
    modes = {module: module.training for module in model.modules()}
    try:  # what is called may differ: an auxiliary head in training, say
        found = [_foldable(_Tracer().trace(model.train(mode)), model) for mode in (True, False)]
    except Exception:  # whatever a network's own code raises when it is given something that is no tensor
        return []
    finally:
        for module, mode in modes.items():
            module.training = mode
    folded = {name: readers for name, readers in found[0].items() if found[1].get(name) == readers}
    for name, readers in folded.items():
        model.set_submodule(name, nn.Identity().train(model.get_submodule(name).training))
        for reader in readers:
            model.get_submodule(reader).activation_quantizer.relu = True
    return list(folded)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return type(module) in QUANTIZED.values() or super().is_leaf_module(module, name)


def _foldable(graph: fx.Graph, model: nn.Module) -> dict[str, set[str]]:
    """Names of the layers that read each ReLU that can be folded."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def module(node):
        return model.get_submodule(node.target) if node.op == "call_module" else None

    def readers(node):
        for user in node.users:
            yield from readers(user) if type(module(user)) is nn.Identity else [user]

    def takes_it_over(node):
        return (type(module(node)) in QUANTIZED.values() and calls[node.target] == 1
                and _plain(module(node).activation_quantizer))

    found = {}
    for node in graph.nodes:
        if type(module(node)) is nn.ReLU and calls[node.target] == 1:
            alone = len(node.args[0].users) == 1 or not module(node).inplace
            reading = list(readers(node))
            if alone and reading and all(map(takes_it_over, reading)):
                found[node.target] = {reader.target for reader in reading}
    return found


def _plain(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and type(quantizer).forward is Quantizer.forward
