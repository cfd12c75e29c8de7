"""QuantConv2d and QuantLinear: float layers with a quantizer for the weight and one for the input.

They are subclasses of the float layers, so parameters and checkpoints keep their keys. `from_float` shares the
parameters instead of copying them. Either quantizer may be None; that side then stays float.

The layer, not the quantizer, normalizes the weight. With m and s the mean and the standard deviation of the layer's
whole weight (gradients go through both), and Q the weight quantizer:

    none  Q(w)
    wn    Q((w - m) / s)      APoT (Li et al., ICLR 2020, sec. 3): the batch norm that follows restores the scale
    lwn   s Q((w - m) / s)    LCQ (Yamamoto, CVPR 2021, "limited weight normalization"): the same before a batch norm,
                              but needs none
"""

from collections.abc import Callable
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from nulsq.quant.base import Quantizer
from nulsq.quant.op import requantized
from nulsq.quant.settings import NORMALIZATIONS


class _Quantized:
    """The common part of both layers. An `observer` receives the layer's float input and disables quantization."""

    weight: Tensor
    channel_dimension: int  # of the input
    weight_quantizer: Quantizer | None
    activation_quantizer: Quantizer | None
    normalization: str
    observer: Callable[[Tensor], object] | None

    def attach(self, weight_quantizer: Quantizer | None, activation_quantizer: Quantizer | None,
               normalization: str = "none") -> Self:
        assert normalization in NORMALIZATIONS, normalization
        self.weight_quantizer = weight_quantizer
        self.activation_quantizer = activation_quantizer
        self.normalization = normalization
        if activation_quantizer is not None:
            activation_quantizer.channel_dimension = self.channel_dimension
        self.observer = None
        return self

    def normalized_weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight that the quantizer gets, and the factor of the quantized weight (None: 1)."""
        if self.normalization == "none":
            return self.weight, None
        deviation = self.weight.std().clamp(min=1e-12)  # that of a constant weight is 0
        normalized = (self.weight - self.weight.mean()) / deviation
        return normalized, deviation if self.normalization == "lwn" else None

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight of the layer's product."""
        quantizer = self.activation_quantizer
        if self.observer is not None:
            x = x if quantizer is None else quantizer.received(x)
            self.observer(x)
            return x, self.weight
        if quantizer is not None:
            x = quantizer(x)
        return x, self.weight if self.weight_quantizer is None else self.quantized_weight()

    def quantized_weight(self) -> Tensor:
        """The weight of the layer's product: quantized, in the shape and type of `weight`. Needs a weight quantizer."""
        assert self.weight_quantizer is not None
        weight, factor = self.normalized_weight()
        weight = self.weight_quantizer(weight)
        return weight if factor is None else weight * factor


class QuantConv2d(_Quantized, nn.Conv2d):
    """A convolution with quantized weight [out, in/groups, kh, kw] and input [batch, in, h, w]."""

    channel_dimension = 1

    @classmethod
    def from_float(cls, conv: nn.Conv2d, *options: Any) -> "QuantConv2d":
        """A quantized layer with the parameters of `conv`; options: those of `attach`."""
        new: Any = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,  # type: ignore[arg-type]
                       conv.padding, conv.dilation, conv.groups, conv.bias is not None,  # type: ignore[arg-type]
                       conv.padding_mode, device="meta")
        return _share_parameters(new, conv).attach(*options)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.quantized(x)
        with requantized(x):
            return self._conv_forward(x, weight, self.bias)


class QuantLinear(_Quantized, nn.Linear):
    """A linear layer with quantized weight [out, in] and input [..., in]."""

    channel_dimension = -1

    @classmethod
    def from_float(cls, linear: nn.Linear, *options: Any) -> "QuantLinear":
        """A quantized layer with the parameters of `linear`; options: those of `attach`."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        return _share_parameters(new, linear).attach(*options)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.quantized(x)
        with requantized(x):
            return F.linear(x, weight, self.bias)


LAYERS = (nn.Conv2d, nn.Linear)
QUANTIZED: dict[type[nn.Module], type[QuantConv2d] | type[QuantLinear]] = {nn.Conv2d: QuantConv2d,
                                                                           nn.Linear: QuantLinear}
Layer = TypeVar("Layer", QuantConv2d, QuantLinear)


def _share_parameters(new: Layer, old: nn.Conv2d | nn.Linear) -> Layer:
    new.weight, new.bias = old.weight, old.bias  # type: ignore[assignment]
    new.train(old.training)
    return new


def is_unsupported_subclass(module: nn.Module) -> bool:
    """Whether a module is a subclass of Conv2d or Linear. It may use its weight in another way, so it stays float."""
    return isinstance(module, LAYERS) and type(module) not in (*QUANTIZED, *QUANTIZED.values())
