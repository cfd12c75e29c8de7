"""quantize_(model, policy): quantize layers in place."""

import warnings
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import LAYERS, QuantizedLayer, quantize_layer_, reason_not_quantizable, weight_parameter
from nulsq.quant.policy import resolve
from nulsq.quant.registry import get_quantizer
from nulsq.quant.settings import FLOAT, Policy, SideRule
from nulsq.text import shortened


def quantize_(model: nn.Module, policy: Policy | None = None, *, batch_shards: int = 1) -> nn.Module:
    """Quantize each convolution (1-D and 2-D) and linear layer, as the policy says. In place; returns the model.

    Layers stay the same objects with the same parameters, hooks and state-dict keys. Step sizes are still missing
    afterwards: `calibrate_(model, batches)` sets them. A subclass whose forward does not call exactly one convolution
    or linear operation stays float; a warning names it. Layers that share a weight share its quantizer.

    Args:
        policy: None uses the default policy, the paper's.
        batch_shards: number of the model's batches in one global batch: ranks times micro-batches of an accumulated
            step. Gradient scales that depend on the batch size need it.

    Raises:
        ValueError: an unknown quantizer, bits that it does not support, a pattern or role that matches no layer,
            contradicting settings, a model that is quantized, compiled or wrapped for several devices already.
    """
    _require_plain_float(model)
    if not isinstance(batch_shards, int) or batch_shards < 1:
        raise ValueError(f"batch_shards = {batch_shards!r}, allowed: whole numbers from 1")
    plan = resolve(policy or Policy(), model)
    of_weights: dict[int, tuple[str, SideRule, Quantizer | None]] = {}  # by id of the parameter
    quantizers: dict[str, tuple[Quantizer | None, Quantizer | None, str]] = {}
    for name, (weight, activation) in plan.items():
        layer: Any = model.get_submodule(name)
        parameter = weight_parameter(layer)
        if parameter is not None and id(parameter) in of_weights:
            other, rule, of_weight = of_weights[id(parameter)]
            if rule != weight:
                raise ValueError(f"{other} and {name} share one weight, but their weight settings differ: give both "
                                 "the same, in one rule that matches both names")
        else:
            of_weight = _build(name, "weight", weight, layer.weight.shape[0])
            if parameter is not None:
                of_weights[id(parameter)] = name, weight, of_weight
        of_activation = _build(name, "activation", activation, None)
        if of_weight is not None or of_activation is not None:
            published = "none" if of_weight is None else of_weight.normalization
            quantizers[name] = of_weight, of_activation, weight.normalization or published
    not_quantized = [f"{name} ({type(module).__name__}: {reason_not_quantizable(module)})"
                     for name, module in model.named_modules() if isinstance(module, LAYERS) and name not in plan]
    # The model is unchanged up to here, so an error above leaves it as it was.
    for name, sides in quantizers.items():
        layer = model.get_submodule(name)
        device = layer.weight.device
        quantize_layer_(layer, *sides)
        for quantizer in filter(None, sides[:2]):
            quantizer.batch_shards = batch_shards
            quantizer.to(device).train(layer.training)
    _avoid_fused_transformer(model)
    if quantizers and not_quantized:
        warnings.warn(f"not quantized: {shortened(not_quantized)}", stacklevel=2)
    return model


def _require_plain_float(model: nn.Module) -> None:
    """Raise ValueError for a model that is quantized or that a wrapper or compiler refers to already."""
    order = ("The order is: build the float model, load its weights, nulsq.quantize_, nulsq.calibrate_, then wrap or "
             "compile it, then build the optimizers")
    for name, module in model.named_modules():
        where = f"{name} is" if name else "the model is"
        classes = {cls.__name__ for cls in type(module).__mro__}
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise ValueError(f"{where} wrapped in {type(module).__name__}, which would keep the float layers. {order}")
        if classes & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(f"{where} wrapped for FSDP, which would keep the float parameters. {order}")
        if "OptimizedModule" in classes or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} compiled, so its graph would keep the float layers. {order}")
        if isinstance(module, Quantizer):
            raise ValueError("the model is quantized already; build a float one and call quantize_ once")


def _avoid_fused_transformer(model: nn.Module) -> None:
    """Switch off torch's fused inference of transformer layers that hold quantized layers: it reads weights only."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
                isinstance(child, QuantizedLayer) for child in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # only the fused layer computes with nested tensors
            else:
                module.register_forward_pre_hook(_no_change)  # torch does not fuse a layer that has hooks


def _no_change(module: nn.Module, args: Any) -> None:
    pass


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
