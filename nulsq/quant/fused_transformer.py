"""torch's fused inference of transformer layers, which reads weights only: off while a layer in it is quantized."""

from typing import Any

from torch import nn

from nulsq.quant.layers import QuantizedLayer


def avoid_fused_transformer(model: nn.Module) -> None:
    """Switch it off where a layer inside is quantized."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if not any(isinstance(child, QuantizedLayer) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            # Only the fused layer computes with nested tensors.
            module.__dict__["nested_tensor_before"], module.use_nested_tensor = module.use_nested_tensor, False
        elif isinstance(module, nn.TransformerEncoderLayer):
            # torch does not fuse a layer that has hooks.
            module.__dict__["hook_against_fusion"] = module.register_forward_pre_hook(_no_change)


def allow_fused_transformer(model: nn.Module) -> None:
    """Undo `avoid_fused_transformer`."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if "nested_tensor_before" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("nested_tensor_before")
        if "hook_against_fusion" in module.__dict__:
            module.__dict__.pop("hook_against_fusion").remove()


def _no_change(module: nn.Module, args: Any) -> None:
    pass
