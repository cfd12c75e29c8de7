"""What a network costs for one image: bits, bytes, multiply-accumulates, bit operations. Needs torch alone.

    multiply-accumulates (MACs)   of a layer: output elements x weights that each is made of
    bit operations                sum over layers of MACs x weight bits x activation bits; a float side counts 32
    average bits                  weight elements, and elements of the layers' inputs, weighted equally
    bytes                         a quantized weight packed at its bits, every other parameter 4 bytes each

Layers are the convolutions (Conv2d) and linear layers, each as often as one forward pass uses it. Every other product
that torch counts (the two inside attention, layers of other kinds) is float and named apart. What normalization,
activation functions and the quantizers themselves compute is not counted.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nulsq.quant.base import Quantizer
from nulsq.quant.modes import in_evaluation

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """A convolution or linear layer and one image."""

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
    """A network and one image."""

    image: tuple[int, ...]  # shape of the image, without the batch
    layers: dict[str, LayerCost]  # by module name
    other_macs: int  # float products outside of the layers
    weight_bytes: int  # quantized weights, packed
    parameter_bytes: int  # every other parameter of the network
    quantizer_bytes: int  # steps, thresholds, ranges: what the quantizers keep in floats
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


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers by name, in the order of definition; float or quantized."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


@torch.no_grad()
def cost_of(model: nn.Module, image: Tensor) -> Cost:
    """The cost of `image` [1, ...], counted in one forward pass. Quantizers have to be calibrated."""
    layers = layers_of(model)
    inputs, macs = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def count(name):
        def hook(layer, args, output):
            inputs[name] += args[0].numel()
            macs[name] += output.numel() * layer.weight[0].numel()
        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        with in_evaluation(model), _unfused(), FlopCounterMode(display=False) as flops:
            model(image)
    finally:
        for handle in handles:
            handle.remove()

    found = {name: LayerCost(layer.weight.numel(), inputs[name], macs[name], bits_of(layer, "weight_quantizer"),
                             bits_of(layer, "activation_quantizer")) for name, layer in layers.items()}
    packed = {id(layer.weight): bits * layer.weight.numel() for layer in layers.values()
              if (bits := bits_of(layer, "weight_quantizer")) != FLOAT_BITS}
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    of_quantizers = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    plain = [parameter for parameter in model.parameters() if id(parameter) not in of_quantizers]
    kept = [value for quantizer in quantizers for value in quantizer.state_dict().values() if value.is_floating_point()]
    return Cost(
        image=tuple(image.shape[1:]), layers=found,
        other_macs=flops.get_total_flops() // 2 - sum(macs.values()),
        weight_bytes=sum(-(-bits // 8) for bits in packed.values()),
        parameter_bytes=4 * sum(parameter.numel() for parameter in plain if id(parameter) not in packed),
        quantizer_bytes=4 * sum(value.numel() for value in kept),
        float_bytes=4 * sum(parameter.numel() for parameter in plain),
    )


def bits_of(layer: nn.Module, side: str) -> int:
    """Bits of a layer's `weight_quantizer` or `activation_quantizer`; 32 without one."""
    quantizer = getattr(layer, side, None)
    return FLOAT_BITS if quantizer is None else quantizer.bits


@contextlib.contextmanager
def _unfused():
    """Attention as plain products, which torch's counter sees; it knows only some of the fused kernels."""
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
