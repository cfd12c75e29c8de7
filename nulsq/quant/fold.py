"""fold_(model) lets quantizers do the work of the batch norms and ReLUs before them; unfold_(model) undoes it.

ReLU and quantizer are two passes over a tensor in each direction; Q(max(x, 0)) is one. A batch norm whose statistics
are known is one multiplication and one addition per element, which the quantizer does in the same pass. The tensors
between the modules are never written.

    ReLU         on every device; output and gradients are the same bit for bit (`Rule.relu`)
    batch norm   where the operation has a kernel for it (`Affine`); the same except for rounding

Modules, parameters, buffers and the keys of the state dict stay as they are. A folded module only changes its class, to
`AbsorbedBatchNorm2d` or `AbsorbedReLU`; its repr, that of the quantizers and `summary` show the folding.

Folding applies to the whole model. While the model that was given to `fold_` runs, a folded module returns its input
and the quantizers do its work. When the module is called in any other way (in a slice of the model, by itself, through
`model.forward`), it does its work itself and the quantizers only quantize, so no slice loses a batch norm or ReLU.
The same holds for as long as the module, or one that reads it, has hooks: they see what they see in the unfolded model.
Do not fold a model that uses torch.utils.checkpoint: recomputation calls its parts by themselves.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import USUAL, QuantizedLayer
from nulsq.quant.op import Affine, available
from nulsq.quant.op.batch_affine import batch_affine
from nulsq.quant.projection import quantizers_of


def fold_(model: nn.Module) -> list[str]:
    """Fold batch norms and ReLUs into the quantizers that read them. In place; returns the names of the folded modules.

    Call it on a calibrated model before training. What reads a module's output is found by torch.fx; a model that
    torch.fx cannot trace is left as it is. These are folded:

    - An `nn.ReLU` that is called once in a forward pass (torchvision's residual blocks call theirs twice) and whose
      output only quantized layers read, each called once too. Their activation quantizers need the usual forward
      (MinMax measures its input, so its forward differs). An in-place ReLU must be the only reader of its input.
    - An `nn.BatchNorm2d` with weight, bias and running statistics for which the same holds.

    Modules with hooks, or read by modules with hooks, stay unfolded; a warning names them. State-dict hooks are no
    obstacle. A model that is folded already is unfolded and folded again.
    """
    unfold_(model)
    if not quantizers_of(model):
        return []
    passes = ForwardPasses()
    hooked: list[str] = []
    folded = _fold(model, nn.ReLU, passes, hooked)
    devices = {parameter.device.type for parameter in model.parameters()}
    if len(devices) == 1 and available(*devices):
        folded += _fold(model, nn.BatchNorm2d, passes, hooked)
    if folded:
        passes.watch(model)
    if hooked:
        warnings.warn(f"not folded, since they or the modules that read them have hooks: {', '.join(hooked)}. "
                      "The model computes the same, only slower", stacklevel=2)
    return folded


def unfold_(model: nn.Module) -> nn.Module:
    """Undo `fold_` exactly. In place; returns the model, which may be unfolded already."""
    for module in model.modules():
        if isinstance(module, AbsorbedBatchNorm2d | AbsorbedReLU):
            module.absorption.passes.forget()
            for quantizer in module.absorption.quantizers.values():
                quantizer.batch_norm = quantizer.relu = ()
            del module.absorption
            module.__class__ = module.unfolded_class
    return model


class ForwardPasses:
    """Counts the forward passes of a folded model that are under way: 0 or 1, more in several threads."""

    def __init__(self) -> None:
        self.running = 0
        self.handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        self.handles = [model.register_forward_pre_hook(self._begin),
                        model.register_forward_hook(self._end, always_call=True)]

    def forget(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: Any) -> None:
        self.running += 1

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.running -= 1


@dataclass(eq=False)
class Absorption:
    """How a module was folded. A plain object, so that the modules in it do not become submodules."""

    name: str  # of the module in the model that was folded
    quantizers: dict[str, Quantizer]  # that do the module's work, by name
    watched: tuple[nn.Module, ...]  # the modules whose input or output folding changes
    passes: ForwardPasses

    @property
    def active(self) -> bool:
        """Whether the quantizers do the module's work at this moment."""
        return self.passes.running > 0 and not any(map(has_hooks, self.watched))

    def described(self, module_repr: str) -> str:
        return f"{module_repr}{', ' if module_repr else ''}absorbed by {', '.join(self.quantizers)}"


class AbsorbedReLU(nn.ReLU):
    """A ReLU whose work the quantizers that read it do."""

    absorption: Absorption
    unfolded_class: Any = nn.ReLU

    def forward(self, x: Tensor) -> Tensor:
        return x if self.absorption.active else super().forward(x)

    def extra_repr(self) -> str:
        return self.absorption.described(super().extra_repr())


class AbsorbedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose work the quantizers that read it do. Its running statistics are updated as usual."""

    absorption: Absorption
    unfolded_class: Any = nn.BatchNorm2d
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x if self.absorption.active else super().forward(x)

    def extra_repr(self) -> str:
        return self.absorption.described(super().extra_repr())

    def affine_of(self, x: Tensor, quantizer: Quantizer) -> Affine | None:
        """The affine map of x [N, C, H, W] that `quantizer` has to apply; None where the batch norm did it itself.

        In training the first of the quantizers that read the batch norm also updates its running statistics.
        """
        if not self.absorption.active:
            return None
        if not available(x.device.type):
            raise RuntimeError(f"a folded network needs the fused kernels, there are none for its input on {x.device}: "
                               "move it before fold_, or undo that with nulsq.unfold_")
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return Affine(self.running_mean, scale, self.bias)
        affine, mean, var = batch_affine(x, self.weight, self.bias, self.eps)
        if quantizer is next(iter(self.absorption.quantizers.values())):
            self._update_statistics_(mean, var, x.numel() // x.shape[1])
        return affine

    def _update_statistics_(self, mean: Tensor, var: Tensor, count: int) -> None:
        """As torch does it: momentum None is the plain average over all batches so far, the variance is unbiased."""
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(mean.dtype)
        var = var * (count / (count - 1))
        if mean.dtype != self.running_mean.dtype:  # otherwise a compiler has one operation less to read
            mean, var = mean.to(self.running_mean.dtype), var.to(self.running_var.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks. torch has no public way to ask."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


# ---- what can be folded


class Readers(NamedTuple):
    """Names of the modules that read a module's output."""

    layers: list[str]  # quantized layers, sorted
    between: list[str]  # modules on the way to them, sorted: identities, and ReLUs that are folded


def _fold(model: nn.Module, kind: type[nn.Module], passes: ForwardPasses, hooked: list[str]) -> list[str]:
    """Fold the modules of one class; adds those that have hooks to `hooked`, as "name (class)"."""
    modes = {module: module.training for module in model.modules()}
    try:  # what is called may depend on the mode: an auxiliary head in training, for example
        training, evaluation = (_foldable(_Tracer().trace(model.train(mode)), model, kind) for mode in (True, False))
    except Exception:  # whatever a network's own code raises when it gets something that is not a tensor
        return []
    finally:
        for module, mode in modes.items():
            module.training = mode
    names = [name for name, readers in training.items() if evaluation.get(name) == readers]
    return [name for name in names if _absorb(model, name, training[name], passes, hooked)]


def _absorb(model: nn.Module, name: str, readers: Readers, passes: ForwardPasses, hooked: list[str]) -> bool:
    module: Any = model.get_submodule(name)
    layers: dict[str, Any] = {layer: model.get_submodule(layer) for layer in readers.layers}
    quantizers = {f"{layer}.activation_quantizer": layers[layer].activation_quantizer for layer in layers}
    between = [model.get_submodule(passed) for passed in readers.between]
    watched = (module, *between, *layers.values(), *quantizers.values())
    if any(map(has_hooks, watched)):
        hooked.append(f"{name} ({type(module).__name__})")
        return False
    # The module stays the same object, so whatever refers to it, its parameters or its hooks keeps doing so.
    # torch.nn.utils.parametrize changes a module's class for the same reason.
    module.__class__ = AbsorbedReLU if type(module) is nn.ReLU else AbsorbedBatchNorm2d
    module.absorption = Absorption(name, quantizers, watched, passes)
    for quantizer in quantizers.values():
        setattr(quantizer, "relu" if type(module) is AbsorbedReLU else "batch_norm", (module,))
    return True


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, QuantizedLayer | AbsorbedReLU) or super().is_leaf_module(module, name)


def _foldable(graph: fx.Graph, model: nn.Module, kind: type[nn.Module]) -> dict[str, Readers]:
    """The modules of one class that can be folded, by name in order of execution, and what reads them."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def module(node: fx.Node) -> Any:
        return model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def passes_on(node: fx.Node) -> bool:
        return type(module(node)) in (nn.Identity, AbsorbedReLU)

    def users(node: fx.Node) -> Iterator[fx.Node]:
        """All users of a node's value, also of what identities and folded ReLUs pass on."""
        for user in node.users:
            yield user
            if passes_on(user):
                yield from users(user)

    def can_absorb(node: fx.Node) -> bool:
        # A layer that pads its input before it quantizes would pad what the batch norm has not mapped yet.
        return (isinstance(module(node), USUAL) and calls[node.target] == 1
                and _has_usual_forward(module(node).activation_quantizer))

    foldable = {}
    for node in graph.nodes:
        if type(module(node)) is not kind or calls[node.target] != 1:
            continue
        if kind is nn.BatchNorm2d and not (module(node).affine and module(node).track_running_stats):
            continue
        if getattr(module(node), "inplace", False) and len(node.args[0].users) > 1:
            continue
        reached = list(users(node))
        readers = [user for user in reached if not passes_on(user)]
        if readers and all(map(can_absorb, readers)):
            foldable[node.target] = Readers(sorted({str(reader.target) for reader in readers}),
                                            sorted({str(user.target) for user in reached if passes_on(user)}))
    return foldable


def _has_usual_forward(quantizer: Quantizer | None) -> bool:
    return quantizer is not None and type(quantizer).forward is Quantizer.forward
