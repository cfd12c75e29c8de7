"""count(model, image): multiply-adds of one forward pass, by layer and by attention.

A layer counts as often as the forward pass calls it, or uses its weight without calling it. Products of quantized
attention modules count by module. Everything else that torch's counter knows is `other`: products of float attention,
transposed and 3-D convolutions, recurrent layers.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.flop_counter import FlopCounterMode

from nulsq.quant.attention import PRODUCTS, QuantizedAttention
from nulsq.quant.attention_adapters import attentions_of, uncalled_layers
from nulsq.quant.base import Quantizer
from nulsq.quant.layers import QuantizedLayer, weight_of
from nulsq.quant.modes import in_evaluation
from nulsq.quant.policy import layers_of
from nulsq.quant.product import Intercept
from nulsq.text import shortened


@dataclass
class Count:
    """Elements of the input and multiply-adds of a layer or of a product, in one forward pass."""

    inputs: int = 0
    macs: int = 0

    def add(self, inputs: int, macs: int) -> None:
        self.inputs += inputs
        self.macs += macs


@dataclass(frozen=True)
class Counts:
    layers: dict[str, Count]  # by module name, see `layers_of`
    products: dict[str, Count]  # "attention.query", "attention.probability": of the first and of the second product
    other: int

    @property
    def macs(self) -> int:
        return self.other + sum(count.macs for count in (*self.layers.values(), *self.products.values()))


def operand_quantizers(model: nn.Module, product: str) -> tuple[Quantizer | None, Quantizer | None]:
    """The quantizers of the left and of the right operand. product: its name in `Counts.products`."""
    attention, _, left = product.rpartition(".")
    module = model.get_submodule(attention)
    return getattr(module, f"{left}_quantizer"), getattr(module, f"{dict(PRODUCTS)[left]}_quantizer")


@dataclass(frozen=True)
class QuantizedShare:
    """How much of a network's multiply-adds is quantized."""

    share: float
    weights_only: bool  # no activation is quantized: the share of the layers' multiply-adds with a quantized weight
    largest_float: list[str]  # "name 12 %", largest first

    def __str__(self) -> str:
        side = "weight of " if self.weights_only else ""
        floats = f"; float: {shortened(self.largest_float)}" if self.largest_float else ""
        return f"quantized: {side}{100 * self.share:.1f} % of the multiply-adds{floats}"


def quantized_share(model: nn.Module, counts: Counts) -> QuantizedShare:
    """The share of the multiply-adds whose both operands are quantized."""
    modules = {name: model.get_submodule(name) for name in counts.layers}
    weights_only = all(getattr(module, "activation_quantizer", None) is None for module in modules.values())
    sides = ("weight_quantizer",) if weights_only else ("weight_quantizer", "activation_quantizer")
    floats = {name: one.macs for name, one in counts.layers.items()
              if any(getattr(modules[name], side, None) is None for side in sides)}
    if weights_only:
        total = sum(one.macs for one in counts.layers.values())
    else:
        total = counts.macs
        floats["products outside of layers"] = counts.other
        floats |= {name: one.macs for name, one in counts.products.items() if None in operand_quantizers(model, name)}
    largest = sorted((name for name, macs in floats.items() if macs > 0), key=lambda name: -floats[name])
    return QuantizedShare(1 - sum(floats.values()) / max(total, 1), weights_only,
                          [f"{name or 'the model'} {100 * floats[name] / total:.1f} %" for name in largest])


@torch.no_grad()
def count(model: nn.Module, image: Tensor) -> Counts:
    """Count `image` [1, ...], in evaluation mode. The model has to be calibrated, or float; it does not change."""
    layers = layers_of(model)
    counts = {name: Count() for name in layers}
    products: dict[str, Count] = {}
    uncalled: dict[str, Any] = {}  # layers whose weight an attention uses without calling them
    observers: dict[Any, Callable[..., bool]] = {}  # of modules that are quantized
    hooks: dict[Any, Callable[..., None]] = {}  # of modules that are called
    for prefix, attention in attentions_of(model).items():
        within = f"{prefix}." if prefix else ""
        uncalled |= {within + name: getattr(attention, name) for name in uncalled_layers(attention)}
        if isinstance(attention, nn.MultiheadAttention):
            hooks[attention] = _of_torchs_attention(counts[prefix], counts[f"{within}out_proj"])
            del uncalled[f"{within}out_proj"]
        if isinstance(attention, QuantizedAttention) and attention.has_quantized_products():
            own = {left: Count() for left, _ in PRODUCTS}
            products |= {within + left: one for left, one in own.items()}
            observers[attention] = _of_products(own)
    for name, layer in layers.items():
        if name not in uncalled and not isinstance(layer, nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
            hooks[layer] = _of_call(counts[name])
        elif name in uncalled and isinstance(layer, QuantizedLayer):
            observers[layer] = _of_linear(counts[name])
    weights = {id(layer.weight): counts[name] for name, layer in uncalled.items() if layer not in observers}

    def see(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if id(weight) in weights:
            weights[id(weight)].add(x.numel(), x.numel() * weight.shape[0])
        return x, weight

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    before = {module: module.observer for module in observers}
    try:
        for module, observer in observers.items():
            module.observer = observer
        with in_evaluation(model), _countable(model), FlopCounterMode(display=False) as flops, Intercept(see):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
        for module in before:
            module.observer = before[module]
    macs = sum(one.macs for one in (*counts.values(), *products.values()))
    return Counts(counts, products, other=flops.get_total_flops() // 2 - macs)


def _of_call(of: Count) -> Callable[..., None]:
    def hook(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        of.add((*args, *kwargs.values())[0].numel(), output.numel() * weight_of(layer)[0].numel())
    return hook


def _of_torchs_attention(projection: Count, output_layer: Count) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        inputs = [given[name] for name in ("query", "key", "value")]
        distinct = {id(x): x for x in inputs}
        projection.add(sum(x.numel() for x in distinct.values()),
                       module.embed_dim * sum(x.numel() for x in inputs))
        output_layer.add(output[0].numel(), output[0].numel() * module.embed_dim)
    return hook


def _of_products(of: dict[str, Count]) -> Callable[..., bool]:
    def observe(**operands: Tensor) -> bool:
        (name, left), *right = operands.items()
        if name in of:  # and not the projection of torch's attention
            of[name].add(left.numel(), left.numel() * right[0][1].shape[-1])
        return True
    return observe


def _of_linear(of: Count) -> Callable[..., bool]:
    def observe(activation: Tensor, weight: Tensor) -> bool:
        of.add(activation.numel(), activation.numel() * weight.shape[0])
        return True
    return observe


@contextlib.contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Attention and recurrent layers as plain products, which are all that torch's counter knows on every device.

    Its counter also fails where a module is called with a parameter that requires a gradient.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration")  # torch sets what other devices lack
            with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False), \
                    torch.backends.cudnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in learned:
            parameter.requires_grad_(True)
