"""quantize_(model, policy): swap layers in place. summary(model): what became of each layer."""

import warnings
from collections import Counter

from torch import nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import QUANTIZED
from nulsq.quant.policy import resolve, roles
from nulsq.quant.settings import FLOAT, Policy, SideRule
from nulsq.quantizers import get_quantizer

LAYERS = (nn.Conv2d, nn.Linear)


def quantize_(model: nn.Module, policy: Policy | None = None, *, shares: int = 1) -> nn.Module:
    """Replace every Conv2d and Linear by its quantized form, as the policy says. In place; returns the model.

    Parameters are shared with the old layers and keep their names. Step sizes come next, from data:
    `calibrate_(model, batches)`. Layers of a subclass of Conv2d or Linear stay float, and a warning names them.

    Args:
        policy: None takes the default one, the paper's.
        shares: how many of the batches that the model sees make one global batch: ranks times micro-batches of an
            accumulated step. Gradient scales that count the batch need it.

    Raises ValueError for an unknown quantizer, bits that it does not have, a pattern or role that matches no layer,
    contradicting settings, or a model that is quantized already.
    """
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise ValueError("the model is quantized already; build a float one and call quantize_ once")
    if not isinstance(shares, int) or shares < 1:
        raise ValueError(f"shares = {shares!r}, allowed: whole numbers from 1")
    plan = resolve(policy or Policy(), model)
    swapped = {}
    for name, (weight, activation) in plan.items():
        layer = model.get_submodule(name)
        sides = (_build(name, "weight", weight, layer.weight.shape[0]), _build(name, "activation", activation, None))
        if sides == (None, None):
            continue
        for quantizer in filter(None, sides):
            quantizer.shares = shares
        normalization = weight.normalization or getattr(sides[0], "normalization", "none")
        new = QUANTIZED[type(layer)].from_float(layer, *sides, normalization)
        swapped[name] = new.to(layer.weight.device)
    # Nothing above touched the model: an error leaves it as it was.
    for name, layer in swapped.items():
        if not name:
            raise ValueError("the model is itself one layer: wrap it (nn.Sequential(layer)) to swap it in place")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    odd = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if _is_odd(module)]
    if swapped and odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        warnings.warn("not quantized, since a subclass of Conv2d or Linear may use its weight in ways of its own: "
                      f"{', '.join(odd[:3])}{more}", stacklevel=2)
    return model


def _build(name: str, role: str, rule: SideRule, channels: int | None) -> Quantizer | None:
    if rule.quantizer == FLOAT:
        return None
    options = {key: value for key in ("signed", "init", "grad_scale", "ste")
               if (value := getattr(rule, key)) is not None} | rule.options
    if rule.per_channel:
        options["channels"] = channels or -1  # -1: per channel where there is none; the quantizer refuses it
    try:
        quantizer = get_quantizer(rule.quantizer)(rule.bits, role, **options)
    except ValueError as error:
        raise ValueError(f"{role} of {name}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{role} of {name}: quantizer {rule.quantizer!r} has no such option: {error}") from None
    return quantizer if rule.learn_scale in (None, True) else quantizer.requires_grad_(False)


def _is_odd(module: nn.Module) -> bool:
    """A layer that looks like one of ours and is another: a subclass, never quantized."""
    return isinstance(module, LAYERS) and type(module) not in (*QUANTIZED, *QUANTIZED.values())


# ---- summary


def summary(model: nn.Module) -> str:
    """A line for each convolution and linear layer: roles, quantizers and bits, or float. Then what else there is.

    The closing lines: the gradient scale of the learned steps, quantizers whose parameters do not learn, and what has
    parameters and stays float.
    """
    of_layer: dict[str, list[str]] = {}
    for role, names in roles(model).items():
        for name in names:
            of_layer.setdefault(name, []).append(role)
    rows = [("layer", "type", "role", "weight", "activation")]
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            weight = activation = "float"
            if type(module) in QUANTIZED.values():
                weight = _side(module.weight_quantizer, module.normalization)
                activation = _side(module.activation_quantizer)
            rows.append((name, type(module).__name__, ",".join(of_layer.get(name, "-")), weight, activation))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*table, *_gradient_scales(model), *_stays_float(model)])


def _side(quantizer: Quantizer | None, normalization: str = "none") -> str:
    if quantizer is None:
        return "float"
    sign = {None: "sign?", True: "signed", False: "unsigned"}[quantizer.signed]
    per = " per channel" if quantizer.channels else ""
    normalized = f" {normalization}" if normalization != "none" else ""
    return f"{quantizer.name()} {quantizer.bits}b {sign}{per}{normalized}"


def _gradient_scales(model):
    learned = [module for module in model.modules() if isinstance(module, Quantizer) and list(module.parameters())]
    if not learned:
        return []
    frozen = [quantizer for quantizer in learned if not any(p.requires_grad for p in quantizer.parameters())]
    used = Counter((f"{quantizer.grad_scale} ({quantizer.name()} {quantizer.role}s)") for quantizer in learned
                   if not any(quantizer is each for each in frozen))
    lines = [f"gradient scale of the steps: {_listed(used)}"] if used else []
    if frozen:
        kinds = Counter(f"{quantizer.name()} {quantizer.role}s" for quantizer in frozen)
        lines.append(f"not learned, as calibrated: {_listed(kinds)}")
    return lines


def _stays_float(model):
    """What has parameters and no quantizer, or products without parameters, in as few lines as possible."""
    layers, odd, loose, attention = Counter(), Counter(), {}, Counter()
    for module in model.modules():
        kind = type(module).__name__
        if "attention" in kind.lower():
            attention[kind] += 1
        if isinstance(module, Quantizer) or type(module) in QUANTIZED.values():
            continue
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if _is_odd(module):
            odd[f"{kind}, a subclass"] += 1
        elif set(own) - {"bias"} == {"weight"}:
            layers[kind] += 1
        elif own:
            loose.setdefault(kind, Counter()).update(own)
    kinds = layers + odd + Counter({f"{name} of {kind}": count
                                    for kind, names in loose.items() for name, count in names.items()})
    lines = [f"stays float: {_listed(kinds)}"] if kinds else []
    if attention:
        lines.append(f"stays float: the two products inside attention, which have no parameters ({_listed(attention)})")
    return lines


def _listed(counts: Counter) -> str:
    return ", ".join(f"{count} x {what}" for what, count in counts.items())
