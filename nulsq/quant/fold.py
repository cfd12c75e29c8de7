"""fold_(model): batch norms and ReLUs whose output only quantized layers read become part of their quantizers.

Q(max(x, 0)) is one pass over x in each direction where ReLU and quantizer apart are two; and a batch norm, once its
statistics are known, is one multiplication and one addition on the way. So the quantizer takes the place of what the
float network has in front of a convolution, and what is between them is never written. Parameters, buffers, their names
and the state dict stay as they are.

    ReLU         everywhere; output and gradients are the same, bit for bit (`Rule.relu`)
    batch norm   where the operation has a kernel for it (`Affine`); the same but for rounding

For a network that is calibrated and about to be trained. What reads an output is found by torch.fx.
"""

from collections import Counter

from torch import Tensor, fx, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import QUANTIZED
from nulsq.quant.op import Affine, available
from nulsq.quant.op.batch_affine import batch_affine
from nulsq.quant.projection import quantizers_of


def fold_(model: nn.Module) -> list[str]:
    """Fold what can be folded, in place; the names of the modules that were, in order of execution.

    A `nn.ReLU` that is called once in a forward pass (torchvision's residual blocks call theirs twice) and read by
    quantized layers alone, each of them called once too, whose activation quantizer has the usual forward (MinMax
    measures its input, so it has not), becomes an Identity. An in-place one must be alone in reading its input. Then a
    `nn.BatchNorm2d` with weight, bias and running statistics of which the same is true.

    A network that torch.fx cannot trace stays as it is.
    """
    if not quantizers_of(model):
        return []
    folded = _fold(model, nn.ReLU, _without_relu)
    devices = {parameter.device.type for parameter in model.parameters()}
    if len(devices) == 1 and available(*devices):
        folded += _fold(model, nn.BatchNorm2d, _deferred)
    return folded


def _without_relu(relu, quantizers):
    for quantizer in quantizers:
        quantizer.relu = True
    return nn.Identity().train(relu.training)


def _deferred(norm, quantizers):
    if not (norm.affine and norm.track_running_stats):
        return None
    made = DeferredBatchNorm(norm, quantizers[0])
    for quantizer in quantizers:
        quantizer.batch_norm = (made,)
    return made


class DeferredBatchNorm(nn.BatchNorm2d):
    """A batch norm that hands its input on, to quantizers that do its work as part of theirs."""

    def __init__(self, norm: nn.BatchNorm2d, first: Quantizer):
        """Takes over `norm`'s parameters and buffers. first: whichever of its readers counts its batches."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)
        self.first = (first,)  # in a tuple, or it would be a module of this one
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def affine_of(self, x: Tensor, reader: Quantizer) -> Affine:
        """What the quantizer `reader` maps x by; once a forward pass for each reader."""
        if not available(x.device.type):
            raise RuntimeError(f"a folded network needs the fused kernels, there are none for its input on {x.device}: "
                               "move it before fold_")
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return Affine(self.running_mean, scale, self.bias)
        affine, mean, var = batch_affine(x, self.weight, self.bias, self.eps)
        if reader is self.first[0]:
            self._count(mean, var, x.numel() // x.shape[1])
        return affine

    def _count(self, mean, var, count):
        """As torch does it: momentum None is the plain average over all batches so far, variance is unbiased."""
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(mean.dtype)
        var = var * (count / (count - 1))
        if mean.dtype != self.running_mean.dtype:  # else an operation less for a compiler to read
            mean, var = mean.to(self.running_mean.dtype), var.to(self.running_var.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)


def _fold(model, kind, replacement) -> list[str]:
    modes = {module: module.training for module in model.modules()}
    try:  # what is called may differ: an auxiliary head in training, say
        found = [_foldable(_Tracer().trace(model.train(mode)), model, kind) for mode in (True, False)]
    except Exception:  # whatever a network's own code raises when it is given something that is no tensor
        return []
    finally:
        for module, mode in modes.items():
            module.training = mode
    folded = []
    for name, readers in found[0].items():
        if found[1].get(name) == readers:
            quantizers = [model.get_submodule(reader).activation_quantizer for reader in readers]
            made = replacement(model.get_submodule(name), quantizers)
            if made is not None:
                model.set_submodule(name, made)
                folded.append(name)
    return folded


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return type(module) in QUANTIZED.values() or super().is_leaf_module(module, name)


def _foldable(graph: fx.Graph, model: nn.Module, kind: type) -> dict[str, list[str]]:
    """Names of the layers that read each module of this kind that can be folded."""
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
        if type(module(node)) is kind and calls[node.target] == 1:
            alone = len(node.args[0].users) == 1 or not getattr(module(node), "inplace", False)
            reading = list(readers(node))
            if alone and reading and all(map(takes_it_over, reading)):
                found[node.target] = sorted({reader.target for reader in reading})
    return found


def _plain(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and type(quantizer).forward is Quantizer.forward
