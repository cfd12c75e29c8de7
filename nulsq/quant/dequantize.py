"""dequantize_(model): back to float layers, the inverse of `quantize_`."""

from typing import Any

import torch
from torch import Tensor, nn

from nulsq.quant.attention import OPERANDS
from nulsq.quant.base import Quantizer
from nulsq.quant.fold import unfold_
from nulsq.quant.fused_transformer import allow_fused_transformer
from nulsq.quant.layers import ChangedModule, ProductLayer, QuantizedLayer, weight_parameter
from nulsq.quant.wrapped import require_plain

ATTRIBUTES = ("weight_quantizer", "activation_quantizer", *(f"{operand}_quantizer" for operand in OPERANDS),
              "normalization", "oscillation", "observer", "reads")
ORDER = "Call dequantize_ on the model itself, and compile or wrap the result"


@torch.no_grad()
def dequantize_(model: nn.Module, *, round_weights: bool = False) -> nn.Module:
    """Make every quantized layer and attention a float one again. In place; returns the model.

    Layers stay the same objects, with their parameters, hooks and attributes. A folded model gets its batch norms and
    ReLUs back. Trackers of oscillating weights are removed.

    Args:
        round_weights: set each weight to the value that its product got, the levels of its quantizer; with weight
            normalization those times the deviation. Otherwise weights stay as they were trained.

    Raises:
        ValueError: a compiled or wrapped model; a layer that was reparametrized after `quantize_`; with
            `round_weights`, a weight that is computed from others or transformed by its layer.
    """
    require_plain(model, ORDER)
    changed = {name: module for name, module in model.named_modules() if isinstance(module, ChangedModule)}
    for name, module in changed.items():
        if module.is_changed_further():
            raise ValueError(f"dequantize_: {name} was reparametrized after quantize_: undo that first")
    rounded = [(module, _rounded(name, module)) for name, module in changed.items()
               if round_weights and isinstance(module, QuantizedLayer) and module.weight_quantizer is not None]
    # The model is unchanged up to here, so an error above leaves it as it was.
    unfold_(model)
    for layer, weight in rounded:
        layer.weight.copy_(weight)
    for module in changed.values():
        _become_float(module)
    allow_fused_transformer(model)
    model.__dict__.pop("quantized_share", None)
    return model


def _rounded(name: str, layer: QuantizedLayer) -> Tensor:
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    if weight_parameter(layer) is None:
        raise ValueError(f"dequantize_: the weight of {name} is computed from other parameters: it cannot be rounded")
    if isinstance(layer, ProductLayer) and not torch.equal(layer.product_weight(), layer.weight):
        raise ValueError(f"dequantize_: {name} ({type(layer).__name__}) transforms its weight before the product: it "
                         "cannot be rounded")
    return layer.quantized_weight()


def _become_float(module: Any) -> None:
    for attribute in ATTRIBUTES:
        if attribute in module.__dict__ or attribute in module._modules:
            delattr(module, attribute)
    if "forward_of_instance" in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop("forward_of_instance")
    module.__class__ = module.float_class
