"""QuantConv2d and QuantLinear: the float layer plus a quantizer for its weight and one for its input.

They subclass the float layers, so parameter names and checkpoints keep their keys; `from_float` shares the
parameters instead of copying them. Either quantizer may be None (that side stays float).

Weight normalization is the layer's, not the quantizer's: with m and s the mean and the standard deviation of the
layer's whole weight (gradients go through both), and Q the weight quantizer,

    none  Q(w)
    wn    Q((w - m) / s)      APoT (Li et al., ICLR 2020, sec. 3): the scale is left to the batch norm that follows
    lwn   s Q((w - m) / s)    LCQ (Yamamoto, CVPR 2021, "limited weight normalization"): the same behind a batch norm,
                              and needs none
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from nulsq.quant.base import Quantizer
from nulsq.quant.op import requantized
from nulsq.quant.settings import NORMALIZATIONS


class _Quantized:
    """What the two layers share. `observer`, when set, sees the layer's float input and switches quantization off."""

    weight_quantizer: Quantizer | None
    activation_quantizer: Quantizer | None
    normalization: str
    observer: Callable[[Tensor], object] | None

    def attach(self, weight_quantizer: Quantizer | None, activation_quantizer: Quantizer | None,
               normalization: str = "none"):
        assert normalization in NORMALIZATIONS, normalization
        self.weight_quantizer = weight_quantizer
        self.activation_quantizer = activation_quantizer
        self.normalization = normalization
        if activation_quantizer is not None:
            activation_quantizer.channel_dimension = self.channel_dimension
        self.observer = None
        return self

    def normalized_weight(self) -> tuple[Tensor, Tensor | None]:
        """The weight as its quantizer sees it, and what the quantized one is multiplied by (None: nothing)."""
        if self.normalization == "none":
            return self.weight, None
        deviation = self.weight.std().clamp(min=1e-12)  # a constant weight has no deviation
        normalized = (self.weight - self.weight.mean()) / deviation
        return normalized, deviation if self.normalization == "lwn" else None

    def quantized(self, x):
        """Input and weight as the layer's product sees them."""
        quantizer = self.activation_quantizer
        if self.observer is not None:
            x = x if quantizer is None else quantizer.received(x)
            self.observer(x)
            return x, self.weight
        if quantizer is not None:
            x = quantizer(x)
        return x, self.weight if self.weight_quantizer is None else self.quantized_weight()

    def quantized_weight(self) -> Tensor:
        """The weight of the product; shape and type of `weight`."""
        weight, factor = self.normalized_weight()
        weight = self.weight_quantizer(weight)
        return weight if factor is None else weight * factor


class QuantConv2d(_Quantized, nn.Conv2d):
    """A convolution with quantized weight [out, in/groups, kh, kw] and input [batch, in, h, w]."""

    channel_dimension = 1

    @classmethod
    def from_float(cls, conv: nn.Conv2d, *quantizers) -> "QuantConv2d":
        new = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                  conv.groups, conv.bias is not None, conv.padding_mode, device="meta")
        return _take_over(new, conv).attach(*quantizers)

    def forward(self, x):
        x, weight = self.quantized(x)
        with requantized(x):
            return self._conv_forward(x, weight, self.bias)


class QuantLinear(_Quantized, nn.Linear):
    """A linear layer with quantized weight [out, in] and input [..., in]."""

    channel_dimension = -1

    @classmethod
    def from_float(cls, linear: nn.Linear, *quantizers) -> "QuantLinear":
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        return _take_over(new, linear).attach(*quantizers)

    def forward(self, x):
        x, weight = self.quantized(x)
        with requantized(x):
            return F.linear(x, weight, self.bias)


LAYERS = (nn.Conv2d, nn.Linear)
QUANTIZED = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


def _take_over(new, old):
    new.weight, new.bias = old.weight, old.bias
    new.train(old.training)
    return new


def is_unsupported_subclass(module: nn.Module) -> bool:
    """Whether a module is a subclass of Conv2d or Linear that may use its weight in its own way: it stays float."""
    return isinstance(module, LAYERS) and type(module) not in (*QUANTIZED, *QUANTIZED.values())
