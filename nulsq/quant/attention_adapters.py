"""Classes of attention that are known to compute softmax(query key^T + bias) value.

Classes are known by name, so no library is imported. A class that is not listed stays as it is; `summary` names it. Add
your own as `ADAPTERS["package.module.Class"] = reads_nothing`.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

Adapter = Callable[[Any], tuple[str, ...]]


def reads_nothing(module: nn.Module) -> tuple[str, ...]:
    """The forward calls all its layers."""
    return ()


def reads_out_proj(module: nn.Module) -> tuple[str, ...]:
    """torch: a function gets the weights."""
    return ("out_proj",)


def reads_qkv(module: Any) -> tuple[str, ...]:
    """timm: the biases of queries and values are parameters of the attention, so it adds them by itself."""
    return ("qkv",) if module.q_bias is not None and not getattr(module, "qkv_bias_separate", False) else ()


def reads_qkv_and_proj(module: nn.Module) -> tuple[str, ...]:
    """torchvision: a function gets the weights."""
    return "qkv", "proj"


# Class -> names of the layers whose weights its forward uses without calling them.
ADAPTERS: dict[str, Adapter] = {
    "torch.nn.modules.activation.MultiheadAttention": reads_out_proj,
    "timm.layers.attention.Attention": reads_nothing,
    "timm.layers.attention.AttentionRope": reads_nothing,
    "timm.models.vision_transformer.Attention": reads_nothing,
    "timm.models.beit.Attention": reads_qkv,
    "timm.models.eva.EvaAttention": reads_qkv,
    "timm.models.swin_transformer.WindowAttention": reads_nothing,
    "timm.models.swin_transformer_v2.WindowAttention": reads_qkv,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": reads_qkv_and_proj,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": reads_qkv_and_proj,
}


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of an attention module; None without one. A subclass with a forward of its own has none."""
    cls: Any = getattr(module, "float_class", type(module))
    if "forward" in module.__dict__ or not _is_usual(module):
        return None
    for base in cls.__mro__:
        adapter = ADAPTERS.get(f"{base.__module__}.{base.__qualname__}")
        if adapter is not None:
            return adapter if cls.forward is base.forward else None
    return None


def attentions_of(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules with an adapter by name, in the order of definition; float or quantized."""
    return {name: module for name, module in model.named_modules() if adapter_of(module) is not None}


def uncalled_layers(module: nn.Module) -> tuple[str, ...]:
    """Names, within an attention module with an adapter, of the layers whose weights it uses without calling them."""
    return cast(Adapter, adapter_of(module))(module)


def _is_usual(module: nn.Module) -> bool:
    """Whether torch's attention projects inputs of one width by one weight, without tokens of its own."""
    return not isinstance(module, nn.MultiheadAttention) or (
        module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn)
