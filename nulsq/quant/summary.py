"""summary(model): the quantizers of each layer, and what stays float."""

from collections import Counter

from torch import nn

from nulsq.quant.attention import PRODUCTS, QuantizedAttention
from nulsq.quant.attention_adapters import adapter_of
from nulsq.quant.base import Quantizer
from nulsq.quant.layers import QuantizedLayer
from nulsq.quant.policy import layers_of, not_quantizable, roles
from nulsq.text import aligned


def summary(model: nn.Module) -> str:
    """A table with a row for each convolution and linear layer: roles, quantizers and bits, or "float".

    Each quantized product inside attention has a row too, with its right operand in the place of the weight. A folded
    model has a column with the batch norms and ReLUs that each layer's quantizer absorbed. The lines after the table
    list gradient scales of the learned steps, quantizers whose parameters are not learned, the share of multiply-adds
    that is quantized (counted by `calibrate_`), and what stays float.
    """
    of_layer: dict[str, list[str]] = {}
    for role, names in roles(model).items():
        for name in names:
            of_layer.setdefault(name, []).append(role)
    rows = [["layer", "type", "role", "weight", "activation", "absorbed"]]
    layers = layers_of(model)
    for name, module in model.named_modules():
        if name in layers:
            weight, activation, absorbed = "float", "float", []
            if isinstance(module, QuantizedLayer):
                weight = _side(module.weight_quantizer, module.normalization)
                activation = _side(module.activation_quantizer)
                absorbed = module.activation_quantizer.absorbed() if module.activation_quantizer is not None else []
            rows.append([name, type(module).__name__, ",".join(of_layer.get(name, "-")), weight, activation,
                         ", ".join(absorbed)])
        if isinstance(module, QuantizedAttention) and module.has_quantized_products():
            for left, right in PRODUCTS:
                rows.append([f"{name}: {left} x {right}", type(module).__name__, "attention",
                             *(_side(getattr(module, f"{operand}_quantizer")) for operand in (right, left)), ""])
    if not any(row[-1] for row in rows[1:]):  # nothing is folded
        rows = [row[:-1] for row in rows]
    return "\n".join([*aligned(rows), *_gradient_scales(model), *_share(model), *_stays_float(model)])


def _side(quantizer: Quantizer | None, normalization: str = "none") -> str:
    if quantizer is None:
        return "float"
    sign = {None: "sign?", True: "signed", False: "unsigned"}[quantizer.signed]
    per = " per channel" if quantizer.channels else ""
    normalized = f" {normalization}" if normalization != "none" else ""
    return f"{quantizer.name()} {quantizer.bits}b {sign}{per}{normalized}"


def _gradient_scales(model: nn.Module) -> list[str]:
    learned = [module for module in model.modules() if isinstance(module, Quantizer) and list(module.parameters())]
    if not learned:
        return []
    frozen = [quantizer for quantizer in learned if not any(p.requires_grad for p in quantizer.parameters())]
    used = Counter((f"{quantizer.grad_scale} ({quantizer.name()} {quantizer.role}s)") for quantizer in learned
                   if not any(quantizer is other for other in frozen))
    lines = [f"gradient scale of the steps: {_listed(used)}"] if used else []
    if frozen:
        names = Counter(f"{quantizer.name()} {quantizer.role}s" for quantizer in frozen)
        lines.append(f"not learned, as calibrated: {_listed(names)}")
    return lines


def _stays_float(model: nn.Module) -> list[str]:
    """Modules with parameters and no quantizer, and the products inside attention."""
    refused = not_quantizable(model)
    layers: Counter[str] = Counter()  # modules with a weight and perhaps a bias
    subclasses: Counter[str] = Counter()
    parameters: Counter[str] = Counter()  # of other modules
    attention: Counter[str] = Counter()
    unknown: Counter[str] = Counter()  # attention without an adapter
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if adapter_of(module) is not None:
            if not (isinstance(module, QuantizedAttention) and module.has_quantized_products()):
                attention[class_name] += 1
        elif "attention" in class_name.lower():
            unknown[class_name] += 1
        if isinstance(module, Quantizer | QuantizedLayer):
            continue
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if name in refused:
            subclasses[f"{class_name} ({refused[name]})"] += 1
        elif set(own) - {"bias"} == {"weight"}:
            layers[class_name] += 1
        else:
            parameters.update(f"{key} of {class_name}" for key in own)
    floats = layers + subclasses + parameters
    lines = [f"stays float: {_listed(floats)}"] if floats else []
    if attention:
        lines.append(f"stays float: the two products inside attention ({_listed(attention)}); a rule that matches "
                     "role:attention quantizes them")
    if unknown:
        lines.append(f"stays float: products inside attention without an adapter ({_listed(unknown)}), see "
                     "nulsq.quant.attention_adapters")
    return lines


def _share(model: nn.Module) -> list[str]:
    share = getattr(model, "quantized_share", None)
    return [] if share is None else [str(share)]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
