"""quantize_(model, policy): quantize layers in place."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nulsq.quant.attention import OPERANDS, quantize_attention_, reads_quantized
from nulsq.quant.attention_adapters import attentions_of
from nulsq.quant.base import Quantizer
from nulsq.quant.fused_transformer import avoid_fused_transformer
from nulsq.quant.layers import quantize_layer_, weight_of, weight_parameter
from nulsq.quant.policy import resolve
from nulsq.quant.registry import get_quantizer
from nulsq.quant.settings import FLOAT, Policy, SideRule
from nulsq.quant.wrapped import require_plain
from nulsq.text import shortened

ORDER = ("The order is: build the float model, load its weights, nulsq.quantize_, nulsq.calibrate_, then wrap or "
         "compile it, then build the optimizers")


def quantize_(model: nn.Module, policy: Policy | None = None, *, batch_shards: int = 1) -> nn.Module:
    """Quantize each convolution (1-D and 2-D) and linear layer, as the policy says. In place; returns the model.

    A rule for `role:attention` also quantizes the operands of the two products inside attention. Layers stay the same
    objects with the same parameters, hooks and state-dict keys. Step sizes are still missing afterwards:
    `calibrate_(model, batches)` sets them. A subclass whose forward does not call exactly one convolution or linear
    operation stays float; a warning names it. Layers that share a weight share its quantizer.

    Args:
        policy: None uses the default policy, the paper's.
        batch_shards: number of the model's batches in one global batch: ranks times micro-batches of an accumulated
            step. Gradient scales that depend on the batch size need it.

    Raises:
        ValueError: an unknown quantizer, bits that it does not support, a pattern or role that matches no layer,
            contradicting settings, a model that is quantized, compiled or wrapped for several devices already.
    """
    require_plain(model, ORDER)
    _require_float(model)
    if not isinstance(batch_shards, int) or batch_shards < 1:
        raise ValueError(f"batch_shards = {batch_shards!r}, allowed: whole numbers from 1")
    plan = resolve(policy or Policy(), model)
    of_weights: dict[int, tuple[str, SideRule, Quantizer | None]] = {}  # by id of the parameter
    quantizers: dict[str, tuple[Quantizer | None, Quantizer | None, str]] = {}
    for name, (weight, activation) in plan.layers.items():
        layer: Any = model.get_submodule(name)
        parameter = weight_parameter(layer)
        if parameter is not None and id(parameter) in of_weights:
            other, rule, of_weight = of_weights[id(parameter)]
            if rule != weight:
                raise ValueError(f"{other} and {name} share one weight, but their weight settings differ: give both "
                                 "the same, in one rule that matches both names")
        else:
            of_weight = _build(name, "weight", weight, weight_of(layer).shape[0])
            if parameter is not None:
                of_weights[id(parameter)] = name, weight, of_weight
        of_activation = _build(name, "activation", activation, None)
        if of_weight is not None or of_activation is not None:
            published = "none" if of_weight is None else of_weight.normalization
            quantizers[name] = of_weight, of_activation, weight.normalization or published
    of_operands = {name: {operand: quantizer for operand in OPERANDS
                          if (quantizer := _build(f"{name}.{operand}", "activation", _of_operand(rule, operand), None))}
                   for name, rule in plan.products.items()}
    not_quantized = [f"{name} ({type(model.get_submodule(name)).__name__}: {reason})"
                     for name, reason in plan.refused.items()]
    # The model is unchanged up to here, so an error above leaves it as it was.
    attentions = attentions_of(model)
    for name, sides in quantizers.items():
        layer = model.get_submodule(name)
        if name not in attentions:
            quantize_layer_(layer, *sides)
        _settle(sides[:2], layer, weight_of(layer).device, batch_shards)
    for name, attention in attentions.items():
        operands = of_operands.get(name, {})
        if operands or name in quantizers or reads_quantized(attention):
            device = next(attention.parameters()).device
            quantize_attention_(attention, operands, quantizers.get(name))
            _settle(operands.values(), attention, device, batch_shards)
    avoid_fused_transformer(model)
    if quantizers and not_quantized:
        warnings.warn(f"not quantized: {shortened(not_quantized)}", stacklevel=2)
    return model


def _require_float(model: nn.Module) -> None:
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise ValueError("the model is quantized already; build a float one and call quantize_ once, or make this one "
                         "float again with nulsq.dequantize_")


def _settle(quantizers: Iterable[Quantizer | None], owner: nn.Module, device: torch.device, batch_shards: int) -> None:
    for quantizer in filter(None, quantizers):
        quantizer.batch_shards = batch_shards
        quantizer.to(device).train(owner.training)


def _of_operand(rule: SideRule, operand: str) -> SideRule:
    """The settings of an attention's operand: probabilities are never negative."""
    return replace(rule, signed=False) if operand == "probability" else rule


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
