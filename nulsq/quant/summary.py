"""summary(model): which quantizers each layer has, and what stays float."""

from collections import Counter

from torch import nn

from nulsq.quant.base import Quantizer
from nulsq.quant.layers import LAYERS, QUANTIZED, is_unsupported_subclass
from nulsq.quant.policy import roles
from nulsq.text import aligned


def summary(model: nn.Module) -> str:
    """A line for each convolution and linear layer: roles, quantizers and bits, or float. Then what else there is.

    The closing lines: the gradient scale of the learned steps, quantizers whose parameters do not learn, and what has
    parameters and stays float.
    """
    of_layer: dict[str, list[str]] = {}
    for role, names in roles(model).items():
        for name in names:
            of_layer.setdefault(name, []).append(role)
    rows = [["layer", "type", "role", "weight", "activation", "absorbed"]]
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            weight, activation, absorbed = "float", "float", []
            if type(module) in QUANTIZED.values():
                weight = _side(module.weight_quantizer, module.normalization)
                activation = _side(module.activation_quantizer)
                absorbed = module.activation_quantizer.absorbed() if module.activation_quantizer is not None else []
            rows.append([name, type(module).__name__, ",".join(of_layer.get(name, "-")), weight, activation,
                         ", ".join(absorbed)])
    if not any(row[-1] for row in rows[1:]):  # nothing is folded
        rows = [row[:-1] for row in rows]
    return "\n".join([*aligned(rows), *_gradient_scales(model), *_stays_float(model)])


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
        if is_unsupported_subclass(module):
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
