"""Which layer gets which quantizer and how many bits: matches the rules of a `Policy` with a network's layers.

A pattern is a module name with shell wildcards (`features.stage1.*`) or a role (see `roles`):

    role:first, role:last   the first and the last convolution or linear layer
    role:depthwise          convolutions of one input channel each
    role:downsample         layers between two resolutions: projection shortcuts, patch merging
    role:qkv                projections of an attention's input to queries, keys and values
    role:attention          the two products inside attention: the rule's activation side quantizes their four operands

A pattern that matches nothing is an error. There is one exception, for a search over several models: a role that this
model does not have is ignored if another pattern of the same rule matches.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from nulsq.errors import did_you_mean
from nulsq.quant.attention_adapters import adapter_of, attentions_of
from nulsq.quant.layers import LAYERS, QuantizedLayer, reason_not_quantizable
from nulsq.quant.settings import LayerRule, Policy, SideRule

SHORTCUTS = {"downsample", "identity_conv", "shortcut"}
PROJECTIONS = {"qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "query", "key", "value"}


class Plan(NamedTuple):
    """What a policy says about a network, by module name."""

    layers: dict[str, tuple[SideRule, SideRule]]  # weight and activation of every quantizable layer
    products: dict[str, SideRule]  # operands of the products of every attention that a rule matches
    refused: dict[str, str]  # why a layer has to stay float


def resolve(policy: Policy, model: nn.Module) -> Plan:
    """Complete settings of each quantizable layer, and of each attention whose products a rule quantizes.

    Raises ValueError for a pattern or role that matches nothing, and for settings that contradict each other.
    """
    refused = not_quantizable(model)
    names = [name for name in layers_of(model) if name not in refused]
    if not names:
        raise ValueError("the model has no Conv1d, Conv2d or Linear layer to quantize")
    policy = policy.without_preset()
    products = {f"products of {name or 'the model'}": name for name in attentions_of(model)}
    of_role = {role: [name for name in matching if name in names] for role, matching in roles(model).items()}
    of_role["attention"] = list(products)
    chosen: dict[str, str] = {}
    for label, rule in policy.rules.items():
        if not rule.enabled:
            continue
        matches = _matches(label, rule, names, of_role, others=policy.rules.keys() - {label})
        for name in matches:
            chosen.setdefault(name, label)
        if label not in chosen.values():
            earlier = sorted({chosen[name] for name in matches})
            raise ValueError(f"quant.rules.{label} changes nothing: earlier rules match all its layers: "
                             f"{', '.join(earlier)}. Change quant.rules.{earlier[0]}, or set its enabled=false")
    return Plan({name: (policy.side("weight", chosen.get(name)), policy.side("activation", chosen.get(name)))
                 for name in names},
                {name: policy.side("activation", chosen[key]) for key, name in products.items() if key in chosen},
                refused)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Convolutions and linear layers by name, in the order of definition; float or quantized.

    nn.MultiheadAttention counts as one: the projection of its inputs to queries, keys and values.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)
            or isinstance(module, nn.MultiheadAttention) and adapter_of(module) is not None}


def quantizable(model: nn.Module) -> list[str]:
    """Names of the layers that can be quantized, in the order of definition."""
    refused = not_quantizable(model)
    return [name for name in layers_of(model) if name not in refused]


def not_quantizable(model: nn.Module) -> dict[str, str]:
    """Why a layer has to stay float, by the names of these layers; see `reason_not_quantizable`."""
    layers, reasons = layers_of(model), {}
    for name, layer in layers.items():
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            reason = (None if name.rpartition(".")[0] in layers
                      else "the attention that uses its weight has inputs of several widths, or tokens of its own")
        else:
            can_be = isinstance(layer, nn.MultiheadAttention | QuantizedLayer)
            reason = None if can_be else reason_not_quantizable(layer)
        if reason is not None:
            reasons[name] = reason
    return reasons


def roles(model: nn.Module) -> dict[str, list[str]]:
    """Names of the layers of each role, in the order of definition; float or quantized. A layer may have several roles.

    Layers that cannot be quantized have roles too, so that the second layer never counts as the first. `first` and
    `last` follow the order of definition, `depthwise` the shape, `downsample` and `qkv` the names that the three model
    libraries use. `attention` lists the attention modules that have an adapter, see `nulsq.quant.attention`.
    """
    layers = layers_of(model)
    names = list(layers)
    return {
        "first": names[:1],
        "last": names[-1:],
        "depthwise": [name for name, layer in layers.items()
                      if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == layer.in_channels > 1],
        "downsample": [name for name in names if SHORTCUTS & set(name.split("."))],
        "qkv": [name for name, layer in layers.items()
                if name.rpartition(".")[2] in PROJECTIONS or isinstance(layer, nn.MultiheadAttention)],
        "attention": list(attentions_of(model)),
    }


def _matches(label: str, rule: LayerRule, names: list[str], of_role: dict[str, list[str]],
             others: Iterable[str]) -> list[str]:
    """What a rule matches, at least one; of_role: what can be matched by role. others: labels of the other rules."""
    if not rule.match:
        raise ValueError(f"quant.rules.{label}.match is empty: the rule has no layers."
                         f"{did_you_mean(label, others, cutoff=0.6)}")
    matches: list[str] = []
    absent = []
    for pattern in rule.match:
        if pattern.startswith("role:"):
            role = pattern.removeprefix("role:")
            if role not in of_role:
                raise ValueError(f"quant.rules.{label}.match: no role {pattern!r}, allowed: "
                                 f"{', '.join(f'role:{known}' for known in of_role)}")
            new = of_role[role]
            if not new:
                absent.append(pattern)
        else:
            new = [name for name in names if fnmatchcase(name, pattern)]
            if not new:
                hint = did_you_mean(pattern, names, count=3) or f" The first layers are {', '.join(names[:3])}."
                raise ValueError(f"quant.rules.{label}.match: {pattern!r} matches no layer.{hint}")
        matches += new
    if not matches:
        present = [f"role:{role}" for role, matching in of_role.items() if matching]
        raise ValueError(f"quant.rules.{label}.match: no layer of this model that can be quantized has "
                         f"{' or '.join(absent)}; it has {', '.join(present) or 'no roles'}. "
                         f"quant.rules.{label}.enabled=false disables the rule")
    return matches
