"""QuantConv2d and QuantLinear: the float layer plus a quantizer for its weight and one for its input.

They subclass the float layers, so parameter names and checkpoints keep their keys; `from_float` shares the
parameters instead of copying them. Either quantizer may be None (that side stays float).
"""

from torch import nn
from torch.nn import functional as F

from nulsq.quant.base import Quantizer


class _Quantized:
    """What the two layers share. `observer`, when set, sees the layer's float input and switches quantization off."""

    def attach(self, weight_quantizer: Quantizer | None, activation_quantizer: Quantizer | None):
        self.weight_quantizer = weight_quantizer
        self.activation_quantizer = activation_quantizer
        self.observer = None
        return self

    def quantized(self, x):
        """Input and weight as the layer's product sees them."""
        if self.observer is not None:
            self.observer(x)
            return x, self.weight
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        return x, weight


class QuantConv2d(_Quantized, nn.Conv2d):
    """A convolution with quantized weight [out, in/groups, kh, kw] and input [batch, in, h, w]."""

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight_quantizer, activation_quantizer) -> "QuantConv2d":
        new = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                  conv.groups, conv.bias is not None, conv.padding_mode, device="meta")
        return _take_over(new, conv).attach(weight_quantizer, activation_quantizer)

    def forward(self, x):
        x, weight = self.quantized(x)
        return self._conv_forward(x, weight, self.bias)


class QuantLinear(_Quantized, nn.Linear):
    """A linear layer with quantized weight [out, in] and input [..., in]."""

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_quantizer, activation_quantizer) -> "QuantLinear":
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        return _take_over(new, linear).attach(weight_quantizer, activation_quantizer)

    def forward(self, x):
        x, weight = self.quantized(x)
        return F.linear(x, weight, self.bias)


QUANTIZED = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


def _take_over(new, old):
    new.weight, new.bias = old.weight, old.bias
    new.train(old.training)
    return new
