"""Quantized layers: a convolution or linear layer with a quantizer for its weight and one for its input.

`quantize_layer_` changes the class of a float layer in place, as torch.nn.utils.parametrize does. The layer stays the
same object, so everything that refers to it or is attached to it stays valid: other names, parameters, hooks,
attributes, reparametrizations of the weight. State-dict keys stay the same. Either quantizer may be None; that side
then stays float.

    Conv1d, Conv2d, Linear                  QuantConv1d, QuantConv2d, QuantLinear; also subclasses with the same forward
    subclasses with a forward of their own  a class with `ProductLayer`, which quantizes the operands of the one
                                            convolution or linear operation that the forward calls: after its padding,
                                            after its transform of the weight (`nulsq.quant.product`)

The layer, not the quantizer, normalizes the weight. With m and s the mean and the standard deviation of the layer's
whole weight (gradients go through both), and Q the weight quantizer:

    none  Q(w)
    wn    Q((w - m) / s)      APoT (Li et al., ICLR 2020, sec. 3): the batch norm that follows restores the scale
    lwn   s Q((w - m) / s)    LCQ (Yamamoto, CVPR 2021, "limited weight normalization"): the same before a batch norm,
                              but needs none
"""

from collections.abc import Callable
from typing import Any, Self, cast

from torch import Tensor, fx, nn
from torch.nn import functional as F

from nulsq.quant.base import Quantizer
from nulsq.quant.op import requantized
from nulsq.quant.product import Intercept, product_operands
from nulsq.quant.settings import NORMALIZATIONS


class ChangedModule(nn.Module):
    """A module whose class quantization has changed in place."""

    float_class: type[nn.Module]
    observer: Callable[..., bool] | None  # gets float operands by name and returns whether to quantize them

    def made_by(self) -> tuple[Callable[..., type], tuple[Any, ...]]:
        """The function that made this module's class, and its arguments."""
        raise NotImplementedError

    def is_changed_further(self) -> bool:
        """Whether something else has changed the class since, such as torch.nn.utils.parametrize."""
        make, arguments = self.made_by()
        return type(self) is not make(*arguments)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the float class: the quantized class may have been made at run time."""
        if self.is_changed_further():
            return super().__reduce_ex__(protocol)
        return _new_module, self.made_by(), self.__dict__.copy()


class QuantizedLayer(ChangedModule):
    """The common part of all quantized layers.

    An `observer` gets the float operands of the layer's product, `activation` and `weight`, and returns whether to
    quantize them.
    """

    channel_dimension: int  # of the input
    weight: Tensor
    weight_quantizer: Quantizer | None
    activation_quantizer: Quantizer | None
    normalization: str

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

    def product_weight(self) -> Tensor:
        """The weight that the layer's product gets before quantization, with its gradient."""
        return self.weight

    def normalized_weight(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight that the quantizer gets, and the factor of the quantized weight (None: 1).

        weight: of the product; None takes `product_weight()`.
        """
        weight = self.product_weight() if weight is None else weight
        if self.normalization == "none":
            return weight, None
        deviation = weight.std().clamp(min=1e-12)  # that of a constant weight is 0
        normalized = (weight - weight.mean()) / deviation
        return normalized, deviation if self.normalization == "lwn" else None

    def quantized(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight of the layer's product."""
        quantizer = self.activation_quantizer
        if self.observer is not None:
            received = x if quantizer is None else quantizer.received(x)
            if not self.observer(activation=received, weight=weight):
                return received, weight
        if quantizer is not None:
            x = quantizer(x)
        return x, weight if self.weight_quantizer is None else self.quantized_weight(weight)

    def quantized_weight(self, weight: Tensor | None = None) -> Tensor:
        """The weight of the layer's product: quantized, in its shape and type. Needs a weight quantizer.

        weight: of the product before quantization; None takes `product_weight()`.
        """
        assert self.weight_quantizer is not None
        weight, factor = self.normalized_weight(weight)
        weight = self.weight_quantizer(weight)
        return weight if factor is None else weight * factor

    def made_by(self) -> tuple[Callable[..., type], tuple[Any, ...]]:
        return quantized_class, (self.float_class, "forward_of_instance" in self.__dict__)


class _QuantizedConvolution(QuantizedLayer):
    """The forward of both convolutions."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_as_leaf(self, input)
        input, weight = self.quantized(input, self.weight)
        with requantized(input):
            return cast(Any, self)._conv_forward(input, weight, self.bias)


class QuantConv1d(_QuantizedConvolution, nn.Conv1d):
    """A convolution with quantized weight [out, in/groups, k] and input [batch, in, length]."""

    float_class = nn.Conv1d
    channel_dimension = -2


class QuantConv2d(_QuantizedConvolution, nn.Conv2d):
    """A convolution with quantized weight [out, in/groups, kh, kw] and input [batch, in, h, w]."""

    float_class = nn.Conv2d
    channel_dimension = -3


class QuantLinear(QuantizedLayer, nn.Linear):
    """A linear layer with quantized weight [out, in] and input [..., in]."""

    float_class = nn.Linear
    channel_dimension = -1

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_as_leaf(self, input)
        input, weight = self.quantized(input, self.weight)
        with requantized(input):
            return F.linear(input, weight, self.bias)


class ProductLayer(QuantizedLayer):
    """A layer whose own forward calls one product; the product's operands are quantized."""

    forward_of_instance: Callable[..., Tensor]  # only where the float layer's instance overrides its class

    def float_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the float layer."""
        if "forward_of_instance" in self.__dict__:
            return self.forward_of_instance(*args, **kwargs)
        return cast(Any, self.float_class).forward(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return call_as_leaf(self, *args, **kwargs)
        with Intercept(self.quantized):
            return self.float_forward(*args, **kwargs)

    def product_weight(self) -> Tensor:
        return product_operands(self, self.float_forward)[1]


# Layers whose quantizers get the layer's own input and weight: nothing is padded or transformed in between.
USUAL: tuple[type[QuantizedLayer], ...] = (QuantConv1d, QuantConv2d, QuantLinear)
LAYERS: tuple[type[nn.Module], ...] = tuple(layer.float_class for layer in USUAL)


def quantize_layer_(layer: nn.Module, weight_quantizer: Quantizer | None, activation_quantizer: Quantizer | None,
                    normalization: str = "none") -> QuantizedLayer:
    """Make a float layer a quantized one, in place; returns the layer. `reason_not_quantizable` must be None for it."""
    override = layer.__dict__.pop("forward", None)
    if override is not None:
        layer.__dict__["forward_of_instance"] = override
    layer.__class__ = quantized_class(type(layer), override is not None)
    return cast(QuantizedLayer, layer).attach(weight_quantizer, activation_quantizer, normalization)


_classes: dict[tuple[type, bool], type[QuantizedLayer]] = {}


def quantized_class(float_class: type, own_forward: bool = False) -> type[QuantizedLayer]:
    """The class of a quantized layer. own_forward: whether an instance overrides the class's forward."""
    key = float_class, own_forward
    if key not in _classes:
        _classes[key] = _make_class(float_class, own_forward)
    return _classes[key]


def _make_class(float_class: type, own_forward: bool) -> type[QuantizedLayer]:
    usual = next(layer for layer in USUAL if issubclass(float_class, layer.float_class))
    if not own_forward and float_class is usual.float_class:
        return usual
    same = not own_forward and all(getattr(float_class, name, None) is getattr(usual.float_class, name, None)
                                   for name in ("forward", "_conv_forward"))
    return type(f"Quant{float_class.__name__}", (usual if same else ProductLayer, float_class),
                {"__module__": __name__, "__doc__": f"A quantized {float_class.__name__}.", "float_class": float_class,
                 "channel_dimension": usual.channel_dimension})


def reason_not_quantizable(layer: nn.Module) -> str | None:
    """Why a convolution or linear layer has to stay float; None if it can be quantized."""
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in layer.parameters(recurse=False)):
        return "its shape is not known yet: run one batch through the model first"
    try:
        if not issubclass(quantized_class(type(layer), "forward" in layer.__dict__), USUAL):
            product_operands(layer, layer.forward)
    except Exception as error:  # whatever the layer's own code raises
        return f"its forward does not call exactly one convolution or linear operation: {error}"
    return None


def weight_of(layer: Any) -> Tensor:
    """The weight of a layer, float or quantized. As a layer, torch's attention is the projection of its inputs."""
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight


def weight_parameter(layer: nn.Module) -> nn.Parameter | None:
    """The layer's own weight; None if it is computed from other parameters."""
    name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    return dict(layer.named_parameters(recurse=False)).get(name)


def call_as_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Under torch.fx tracing: a call of the whole module as one node, since its forward depends on values."""
    tracer = next(value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)).tracer
    return tracer.create_proxy("call_module", cast(Any, tracer).path_of_module(module), args, kwargs)


def _new_module(make: Callable[..., type], arguments: tuple[Any, ...]) -> nn.Module:
    return cast(nn.Module, object.__new__(make(*arguments)))
