"""Costs of a network for one image: bits, bytes, multiply-accumulates, bit operations. Needs torch alone.

    multiply-accumulates (MACs)   of a layer: output elements x weights per output element
    bit operations                sum over layers of MACs x weight bits x activation bits; a float side counts 32
    average bits                  mean over weight elements, and over elements of the layers' inputs
    bytes                         quantized weights packed, every other parameter 4 bytes

Layers are convolutions (Conv1d, Conv2d) and linear layers. A layer counts as often as one forward pass calls it. All
other products that torch counts (the two inside attention, other types of layers) are float and reported separately.
Normalization, activation functions and the quantizers themselves are not counted.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import LAYERS
from nulsq.quant.modes import in_evaluation

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """Costs of a convolution or linear layer for one image."""

    weights: int  # elements of the weight
    inputs: int  # elements of the input
    macs: int
    weight_bits: int  # 32 for a float side
    activation_bits: int

    @property
    def bit_operations(self) -> int:
        return self.macs * self.weight_bits * self.activation_bits


@dataclass(frozen=True)
class Cost:
    """Costs of a network for one image."""

    image: tuple[int, ...]  # shape of the image, without the batch
    layers: dict[str, LayerCost]  # by module name
    other_macs: int  # float products outside of the layers
    weight_bytes: int  # quantized weights, packed
    parameter_bytes: int  # every other parameter of the network
    quantizer_bytes: int  # steps, thresholds, ranges: the floats in the quantizers' state
    float_bytes: int  # the float network's parameters

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.parameter_bytes + self.quantizer_bytes

    @property
    def macs(self) -> int:
        return self.other_macs + sum(layer.macs for layer in self.layers.values())

    @property
    def bit_operations(self) -> int:
        other = self.other_macs * FLOAT_BITS**2
        return other + sum(layer.bit_operations for layer in self.layers.values())

    @property
    def float_bit_operations(self) -> int:
        return self.macs * FLOAT_BITS**2

    @property
    def average_weight_bits(self) -> float:
        return _average([(layer.weight_bits, layer.weights) for layer in self.layers.values()])

    @property
    def average_activation_bits(self) -> float:
        return _average([(layer.activation_bits, layer.inputs) for layer in self.layers.values()])


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The convolutions and linear layers by name, in the order of definition; float or quantized."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


@torch.no_grad()
def cost_of(model: nn.Module, image: Tensor) -> Cost:
    """The cost of `image` [1, ...], counted in one forward pass. The model has to be calibrated, or float."""
    layers = layers_of(model)
    inputs, macs = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            inputs[name] += (*args, *kwargs.values())[0].numel()
            macs[name] += output.numel() * layer.weight[0].numel()
        return hook

    handles = [layer.register_forward_hook(count(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with in_evaluation(model), _unfused(), FlopCounterMode(display=False) as flops:
            model(image)
    finally:
        for handle in handles:
            handle.remove()

    costs = {name: LayerCost(layer.weight.numel(), inputs[name], macs[name], bits_of(layer, "weight_quantizer"),
                             bits_of(layer, "activation_quantizer")) for name, layer in layers.items()}
    packed = {id(layer.weight): bits * layer.weight.numel() for layer in layers.values()
              if (bits := bits_of(layer, "weight_quantizer")) != FLOAT_BITS}
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    of_quantizers = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in of_quantizers]
    floats = [value for quantizer in quantizers for value in quantizer.state_dict().values()
              if value.is_floating_point()]
    return Cost(
        image=tuple(image.shape[1:]), layers=costs,
        other_macs=flops.get_total_flops() // 2 - sum(macs.values()),
        weight_bytes=sum(-(-bits // 8) for bits in packed.values()),
        parameter_bytes=4 * sum(parameter.numel() for parameter in others if id(parameter) not in packed),
        quantizer_bytes=4 * sum(value.numel() for value in floats),
        float_bytes=4 * sum(parameter.numel() for parameter in others),
    )


def bits_of(layer: nn.Module, side: str) -> int:
    """Bits of a layer's `weight_quantizer` or `activation_quantizer`; 32 without one."""
    quantizer = getattr(layer, side, None)
    return FLOAT_BITS if quantizer is None else quantizer.bits


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Compute attention by plain products: torch's counter knows only some of the fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _average(pairs: list[tuple[int, int]]) -> float:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else float("nan")
