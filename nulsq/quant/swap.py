"""quantize_(model, policy): swap layers in place. summary(model): what became of each layer."""

from torch import nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import QUANTIZED
from nulsq.quant.policy import FLOAT, Policy, SideRule
from nulsq.quantizers import get_quantizer


def quantize_(model: nn.Module, policy: Policy | None = None) -> nn.Module:
    """Replace every Conv2d and Linear by its quantized form, as the policy says. In place; returns the model.

    Parameters are shared with the old layers and keep their names. Step sizes come next, from data:
    `calibrate_(model, batches)`.

    Raises ValueError for an unknown quantizer, bits that it does not have, a pattern that matches no layer, or a
    model that is quantized already.
    """
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise ValueError("the model is quantized already; build a float one and call quantize_ once")
    plan = (policy or Policy()).resolve(model)
    swapped = {}
    for name, (weight, activation) in plan.items():
        layer = model.get_submodule(name)
        sides = (_build(name, "weight", weight, layer.weight.shape[0]), _build(name, "activation", activation, None))
        if sides != (None, None):
            swapped[name] = QUANTIZED[type(layer)].from_float(layer, *sides).to(layer.weight.device)
    # Nothing above touched the model: an error leaves it as it was.
    for name, layer in swapped.items():
        if not name:
            raise ValueError("the model is itself one layer: wrap it (nn.Sequential(layer)) to swap it in place")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def _build(name: str, role: str, rule: SideRule, channels: int | None) -> Quantizer | None:
    if rule.quantizer == FLOAT:
        return None
    options = {key: value for key in ("signed", "init", "grad_scale", "ste")
               if (value := getattr(rule, key)) is not None} | rule.options
    if rule.per_channel:
        options["channels"] = channels or -1  # -1: per channel where there is none; the quantizer refuses it
    try:
        return get_quantizer(rule.quantizer)(rule.bits, role, **options)
    except ValueError as error:
        raise ValueError(f"{role} of {name}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{role} of {name}: quantizer {rule.quantizer!r} has no such option: {error}") from None


def summary(model: nn.Module) -> str:
    """A line for each layer with weights: its quantizers and bits, or float."""
    def side(quantizer):
        if quantizer is None:
            return "float"
        sign = {None: "sign?", True: "signed", False: "unsigned"}[quantizer.signed]
        per = " per channel" if quantizer.channels else ""
        return f"{quantizer.name()} {quantizer.bits}b {sign}{per}"

    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            quantized = type(module) in QUANTIZED.values()
            rows.append((name, type(module).__name__, side(module.weight_quantizer) if quantized else "float",
                         side(module.activation_quantizer) if quantized else "float"))
    rows.insert(0, ("layer", "type", "weight", "activation"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)
