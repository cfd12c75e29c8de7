"""Costs of a network for one image: bits, bytes, multiply-accumulates, bit operations. Needs torch alone.

    multiply-accumulates (MACs)   of a layer: output elements x weights per output element
    bit operations                sum over layers of MACs x weight bits x activation bits; a float side counts 32
    average bits                  mean over weight elements, and over elements of the layers' inputs
    bytes                         quantized weights packed, every other parameter 4 bytes

Layers are convolutions (Conv1d, Conv2d) and linear layers. A layer counts as often as one forward pass calls it. The
products inside quantized attention count with the bits of their operands. All other products that torch counts (float
attention, other types of layers) are float and reported separately. Normalization, activation functions and the
quantizers themselves are not counted.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import weight_of
from nulsq.quant.multiply_adds import count, operand_quantizers
from nulsq.quant.policy import layers_of

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """Costs of a convolution or linear layer, or of a product inside attention, for one image."""

    weights: int  # elements of the weight; 0 of a product
    inputs: int  # elements of the input
    macs: int
    weight_bits: int  # 32 for a float side; of a product: those of the right operand
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
    products: dict[str, LayerCost] = field(default_factory=dict)  # inside quantized attention, by left operand

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.parameter_bytes + self.quantizer_bytes

    @property
    def macs(self) -> int:
        return self.other_macs + sum(each.macs for each in self._counted())

    @property
    def bit_operations(self) -> int:
        other = self.other_macs * FLOAT_BITS**2
        return other + sum(each.bit_operations for each in self._counted())

    @property
    def float_bit_operations(self) -> int:
        return self.macs * FLOAT_BITS**2

    def _counted(self) -> list[LayerCost]:
        return [*self.layers.values(), *self.products.values()]

    @property
    def average_weight_bits(self) -> float:
        return _average([(layer.weight_bits, layer.weights) for layer in self.layers.values()])

    @property
    def average_activation_bits(self) -> float:
        return _average([(layer.activation_bits, layer.inputs) for layer in self.layers.values()])


def cost_of(model: nn.Module, image: Tensor) -> Cost:
    """The cost of `image` [1, ...], counted in one forward pass. The model has to be calibrated, or float."""
    layers, counts = layers_of(model), count(model, image)
    costs = {name: LayerCost(weight_of(layer).numel(), counts.layers[name].inputs, counts.layers[name].macs,
                             bits_of(layer, "weight_quantizer"), bits_of(layer, "activation_quantizer"))
             for name, layer in layers.items()}
    products = {}
    for name, one in counts.products.items():
        left, right = map(_bits, operand_quantizers(model, name))
        products[name] = LayerCost(0, one.inputs, one.macs, right, left)
    packed = {id(weight_of(layer)): bits * weight_of(layer).numel() for layer in layers.values()
              if (bits := bits_of(layer, "weight_quantizer")) != FLOAT_BITS}
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    of_quantizers = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in of_quantizers]
    floats = [value for quantizer in quantizers for value in quantizer.state_dict().values()
              if value.is_floating_point()]
    return Cost(
        image=tuple(image.shape[1:]), layers=costs, products=products, other_macs=counts.other,
        weight_bytes=sum(-(-bits // 8) for bits in packed.values()),
        parameter_bytes=4 * sum(parameter.numel() for parameter in others if id(parameter) not in packed),
        quantizer_bytes=4 * sum(value.numel() for value in floats),
        float_bytes=4 * sum(parameter.numel() for parameter in others),
    )


def bits_of(layer: nn.Module, side: str) -> int:
    """Bits of a layer's `weight_quantizer` or `activation_quantizer`; 32 without one."""
    return _bits(getattr(layer, side, None))


def _bits(quantizer: Quantizer | None) -> int:
    return FLOAT_BITS if quantizer is None else quantizer.bits


def _average(pairs: list[tuple[int, int]]) -> float:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else float("nan")
