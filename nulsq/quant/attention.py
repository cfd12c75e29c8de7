"""Attention: its two products, and layers whose weights it uses without calling them.

    scores = query key^T          output = probability value,  probability = softmax(scores / sqrt(d) + bias)

`quantize_attention_` changes the class of an attention module in place, as `quantize_layer_` does for a layer. The
module's own forward runs; a `TorchFunctionMode` sees its products, whether they are written out or a call of
`F.scaled_dot_product_attention`, and quantizes their operands. The probabilities are never negative: their grid is
unsigned. The same mode quantizes `F.linear(x, self.qkv.weight, bias)`, which some networks use instead of calling
`self.qkv`. torch's own attention hides its operations, so it gets a forward of ours.

Only classes that are known to compute this are changed, see `nulsq.quant.attention_adapters`.
"""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nulsq.quant.attention_adapters import uncalled_layers
from nulsq.quant.base import Quantizer
from nulsq.quant.layers import ChangedModule, QuantizedLayer, call_as_leaf
from nulsq.quant.op import requantized
from nulsq.quant.product import Intercept

PRODUCTS = (("query", "key"), ("probability", "value"))
OPERANDS = tuple(operand for product in PRODUCTS for operand in product)
MATRIX_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


def reads_quantized(module: nn.Module) -> bool:
    """Whether an attention module uses the weight of a quantized layer without calling that layer."""
    return any(isinstance(getattr(module, name), QuantizedLayer) for name in uncalled_layers(module))


class QuantizedAttention(ChangedModule):
    """The common part of quantized attention modules.

    An `observer` gets the operands of each product and returns whether to quantize them.
    """

    query_quantizer: Quantizer | None
    key_quantizer: Quantizer | None
    value_quantizer: Quantizer | None
    probability_quantizer: Quantizer | None
    reads: tuple[str, ...]  # names of the layers whose weights the float forward uses without calling them

    def attach_operands(self, quantizers: dict[str, Quantizer]) -> Self:
        """quantizers: by operand; without any, the products stay float."""
        self.reads = uncalled_layers(self)
        for operand in OPERANDS:
            quantizer = quantizers.get(operand)
            setattr(self, f"{operand}_quantizer", quantizer)
            if quantizer is not None:
                quantizer.channel_dimension = -1
        self.observer = None
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return call_as_leaf(self, *args, **kwargs)
        with _Products(self) as products:
            output = self.float_forward(*args, **kwargs)
        products.require_both()
        return output

    def float_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the float module."""
        return cast(Any, self.float_class).forward(self, *args, **kwargs)

    def has_quantized_products(self) -> bool:
        return any(getattr(self, f"{operand}_quantizer") is not None for operand in OPERANDS)

    def operands(self, product: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The operands of the first or second product, quantized."""
        names = PRODUCTS[product]
        if self.observer is not None and not self.observer(**dict(zip(names, (left, right), strict=True))):
            return left, right
        quantizers = [getattr(self, f"{name}_quantizer") for name in names]
        left, right = (x if quantizer is None else quantizer(x)
                       for x, quantizer in zip((left, right), quantizers, strict=True))
        return left, right

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> tuple[Tensor, Tensor]:
        """`F.scaled_dot_product_attention`, written out with quantized operands; also returns the probabilities."""
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        scores = torch.matmul(*self.operands(0, query, key.transpose(-2, -1)))
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        probability = F.dropout(scores.softmax(-1), dropout_p)
        return torch.matmul(*self.operands(1, probability, value)), probability

    def linear_operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight of a linear operation; quantized if the weight is that of a layer that is not called."""
        layers = [getattr(self, name) for name in self.reads]
        layer = next((layer for layer in layers if isinstance(layer, QuantizedLayer) and layer.weight is weight), None)
        return (x, weight) if layer is None else layer.quantized(x, weight)

    def made_by(self) -> tuple[Callable[..., type], tuple[Any, ...]]:
        return attention_class, (self.float_class,)


class _Products(Intercept):
    """Within the context, an attention's products are those of quantized operands."""

    def __init__(self, attention: QuantizedAttention):
        super().__init__(attention.linear_operands)
        self.attention = attention
        self.seen = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if self.attention.has_quantized_products():
            if func is F.scaled_dot_product_attention:
                self.seen += 2
                return self.attention.attend(*args, **(kwargs or {}))[0]
            if func in MATRIX_PRODUCTS:
                self.seen += 1
                if self.seen <= 2:
                    return func(*self.attention.operands(self.seen - 1, *args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def require_both(self) -> None:
        """Raise RuntimeError unless the forward was the one that the adapter stands for."""
        if self.seen != 2 and self.attention.has_quantized_products():
            raise RuntimeError(f"{self.attention.float_class.__name__} computed {self.seen} matrix products, not the "
                               "two of attention: its library changed after nulsq.quant.attention_adapters was written")


class QuantMultiheadAttention(QuantizedAttention, QuantizedLayer, nn.MultiheadAttention):
    """torch's attention. As a layer it is the projection of its inputs to queries, keys and values: one weight
    quantizer, and one activation quantizer for all inputs."""

    float_class = nn.MultiheadAttention
    channel_dimension = -1

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[3 E, E], rows of queries, keys, values."""
        return self.in_proj_weight

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention. is_causal is a hint that attn_mask is causal; the mask is what is used."""
        if any(isinstance(x, fx.Proxy) for x in (query, key, value)):
            return call_as_leaf(self, query, key, value, key_padding_mask, need_weights, attn_mask,
                                average_attn_weights, is_causal)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs attn_mask, as in nn.MultiheadAttention")
        projected = self._projected(query, key, value)
        batched = query.dim() == 3
        if not batched:
            projected = [x.unsqueeze(0) for x in projected]
        elif not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]  # [B, heads, tokens, d]
        mask = self._mask(heads[0], attn_mask, key_padding_mask)
        q, k, v = heads
        dropout = self.dropout if self.training else 0.0
        probability = None
        if need_weights or self.has_quantized_products():
            output, probability = self.attend(q, k, v, mask, dropout)
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if probability is None or not need_weights:
            return output, None
        probability = probability.mean(-3) if average_attn_weights else probability
        return output, probability if batched else probability.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if query is key is value:
            x, weight = self.quantized(query, self.weight)
            with requantized(x):
                return list(F.linear(x, weight, self.in_proj_bias).chunk(3, -1))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = []
        for number, x in enumerate((query, key, value)):
            x, weight = self.quantized(x, self.weight)
            with requantized(x):
                projected.append(F.linear(x, weight.chunk(3)[number], biases[number]))
        return projected

    @staticmethod
    def _mask(query: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores [B, heads, targets, sources]. True: not attended to."""
        def added(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask.to(query.dtype)
            return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf)

        total = None
        if attn_mask is not None:  # [targets, sources] or [B heads, targets, sources]
            total = added(attn_mask)
            total = total.unflatten(0, query.shape[:2]) if attn_mask.dim() == 3 else total
        if key_padding_mask is not None:  # [B, sources], or [sources]
            padding = added(key_padding_mask)[..., None, None, :]
            total = padding if total is None else total + padding
        return total


_classes: dict[type[nn.Module], type[QuantizedAttention]] = {nn.MultiheadAttention: QuantMultiheadAttention}


def attention_class(float_class: type[nn.Module]) -> type[QuantizedAttention]:
    """The class of a quantized attention module."""
    if float_class not in _classes:
        base = QuantMultiheadAttention if issubclass(float_class, nn.MultiheadAttention) else QuantizedAttention
        _classes[float_class] = type(f"Quant{float_class.__name__}", (base, float_class), {
            "__module__": __name__, "__doc__": f"A quantized {float_class.__name__}.", "float_class": float_class})
    return _classes[float_class]


def quantize_attention_(module: nn.Module, quantizers: dict[str, Quantizer],
                        projection: tuple[Quantizer | None, Quantizer | None, str] | None = None,
                        ) -> QuantizedAttention:
    """Make an attention module a quantized one, in place; returns the module. It must have an adapter.

    quantizers: by operand, see `OPERANDS`; empty leaves the products float.
    projection: quantizers and normalization of nn.MultiheadAttention as a layer; None leaves it float.
    """
    module.__class__ = attention_class(type(module))
    if isinstance(module, QuantMultiheadAttention):
        module.attach(*(projection or (None, None, "none")))
    return cast(QuantizedAttention, module).attach_operands(quantizers)
