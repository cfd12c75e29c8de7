"""quantize_(model, policy): replace layers by their quantized forms, in place."""

import warnings
from typing import Any

from torch import nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import QUANTIZED, is_unsupported_subclass
from nulsq.quant.policy import resolve
from nulsq.quant.registry import get_quantizer
from nulsq.quant.settings import FLOAT, Policy, SideRule


def quantize_(model: nn.Module, policy: Policy | None = None, *, batch_shards: int = 1) -> nn.Module:
    """Replace each Conv2d and Linear by its quantized form, as the policy says. In place; returns the model.

    Parameters are shared with the old layers and keep their names. Step sizes are still missing afterwards:
    `calibrate_(model, batches)` sets them. Layers of a subclass of Conv2d or Linear stay float; a warning names them.

    Args:
        policy: None uses the default policy, the paper's.
        batch_shards: number of the model's batches in one global batch: ranks times micro-batches of an accumulated
            step. Gradient scales that depend on the batch size need it.

    Raises:
        ValueError: an unknown quantizer, bits that it does not support, a pattern or role that matches no layer,
            contradicting settings, or a model that is quantized already.
    """
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise ValueError("the model is quantized already; build a float one and call quantize_ once")
    if not isinstance(batch_shards, int) or batch_shards < 1:
        raise ValueError(f"batch_shards = {batch_shards!r}, allowed: whole numbers from 1")
    plan = resolve(policy or Policy(), model)
    replacements: dict[str, nn.Module] = {}
    for name, (weight, activation) in plan.items():
        layer: Any = model.get_submodule(name)
        sides = (_build(name, "weight", weight, layer.weight.shape[0]), _build(name, "activation", activation, None))
        if sides == (None, None):
            continue
        for quantizer in filter(None, sides):
            quantizer.batch_shards = batch_shards
        normalization = weight.normalization or getattr(sides[0], "normalization", "none")
        quantized = QUANTIZED[type(layer)].from_float(layer, *sides, normalization)
        replacements[name] = quantized.to(layer.weight.device)
    # The model is unchanged up to here, so an error above leaves it as it was.
    for name, replacement in replacements.items():
        if not name:
            raise ValueError("the model is itself one layer: wrap it (nn.Sequential(layer)) to replace it in place")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    subclasses = [f"{name} ({type(module).__name__})" for name, module in model.named_modules()
                  if is_unsupported_subclass(module)]
    if replacements and subclasses:
        more = f" and {len(subclasses) - 3} more" if len(subclasses) > 3 else ""
        warnings.warn("not quantized, since a subclass of Conv2d or Linear may use its weight in another way: "
                      f"{', '.join(subclasses[:3])}{more}", stacklevel=2)
    return model


def _build(name: str, role: str, rule: SideRule, channels: int | None) -> Quantizer | None:
    assert rule.quantizer is not None and rule.bits is not None  # `resolve` completes every rule
    if rule.quantizer == FLOAT:
        return None
    options = {key: value for key in ("signed", "init", "grad_scale", "ste")
               if (value := getattr(rule, key)) is not None} | rule.options
    if rule.per_channel:
        options["channels"] = channels or -1  # -1 for activations: the quantizer raises the error
    try:
        quantizer = get_quantizer(rule.quantizer)(rule.bits, role, **options)
    except ValueError as error:
        raise ValueError(f"{role} of {name}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{role} of {name}: quantizer {rule.quantizer!r} has no such option: {error}") from None
    return quantizer if rule.learn_scale in (None, True) else quantizer.requires_grad_(False)
