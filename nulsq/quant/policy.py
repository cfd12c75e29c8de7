"""Which layer gets which quantizer and how many bits: matches the rules of a `Policy` with a network's layers.

A pattern is a module name with shell wildcards (`features.stage1.*`) or a role (see `roles`):

    role:first, role:last   the first and the last convolution or linear layer
    role:depthwise          convolutions of one input channel each
    role:downsample         layers between two resolutions: projection shortcuts, patch merging
    role:qkv                projections of an attention's input to queries, keys and values

A pattern that matches nothing is an error. There is one exception, for a search over several models: a role that this
model does not have is ignored if another pattern of the same rule matches.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nulsq.errors import did_you_mean
from nulsq.quant.layers import LAYERS, reason_not_quantizable
from nulsq.quant.settings import LayerRule, Policy, SideRule

SHORTCUTS = {"downsample", "identity_conv", "shortcut"}
PROJECTIONS = {"qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "query", "key", "value"}


def resolve(policy: Policy, model: nn.Module) -> dict[str, tuple[SideRule, SideRule]]:
    """Complete (weight, activation) settings of each quantizable layer, by module name.

    Raises ValueError for a pattern or role that matches nothing, and for settings that contradict each other.
    """
    names = quantizable(model)
    if not names:
        raise ValueError("the model has no Conv1d, Conv2d or Linear layer to quantize")
    policy, roles_of_model = policy.without_preset(), roles(model)
    chosen: dict[str, str] = {}
    for label, rule in policy.rules.items():
        if not rule.enabled:
            continue
        matches = _matches(label, rule, names, roles_of_model, others=policy.rules.keys() - {label})
        for name in matches:
            chosen.setdefault(name, label)
        if label not in chosen.values():
            earlier = sorted({chosen[name] for name in matches})
            raise ValueError(f"quant.rules.{label} changes nothing: earlier rules match all its layers: "
                             f"{', '.join(earlier)}. Change quant.rules.{earlier[0]}, or set its enabled=false")
    return {name: (policy.side("weight", chosen.get(name)), policy.side("activation", chosen.get(name)))
            for name in names}


def quantizable(model: nn.Module) -> list[str]:
    """Names of the layers that can be quantized, in the order of definition; see `reason_not_quantizable`."""
    return [name for name, module in model.named_modules()
            if isinstance(module, LAYERS) and reason_not_quantizable(module) is None]


def roles(model: nn.Module) -> dict[str, list[str]]:
    """Names of the layers of each role, in the order of definition; float or quantized. A layer may have several roles.

    Layers that cannot be quantized have roles too, so that the second layer never counts as the first. `first` and
    `last` follow the order of definition, `depthwise` the shape, `downsample` and `qkv` the names that the three model
    libraries use.
    """
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    names = list(layers)
    return {
        "first": names[:1],
        "last": names[-1:],
        "depthwise": [name for name, layer in layers.items()
                      if not isinstance(layer, nn.Linear) and layer.groups == layer.in_channels > 1],
        "downsample": [name for name in names if SHORTCUTS & set(name.split("."))],
        "qkv": [name for name in names if name.rpartition(".")[2] in PROJECTIONS],
    }


def _matches(label: str, rule: LayerRule, names: list[str], roles_of_model: dict[str, list[str]],
             others: Iterable[str]) -> list[str]:
    """Names of the quantizable layers that a rule matches, at least one. others: labels of the other rules."""
    if not rule.match:
        raise ValueError(f"quant.rules.{label}.match is empty: the rule has no layers."
                         f"{did_you_mean(label, others, cutoff=0.6)}")
    matches: list[str] = []
    absent = []
    for pattern in rule.match:
        if pattern.startswith("role:"):
            role = pattern.removeprefix("role:")
            if role not in roles_of_model:
                raise ValueError(f"quant.rules.{label}.match: no role {pattern!r}, allowed: "
                                 f"{', '.join(f'role:{known}' for known in roles_of_model)}")
            new = [name for name in names if name in roles_of_model[role]]
            if not new:
                absent.append(pattern)
        else:
            new = [name for name in names if fnmatchcase(name, pattern)]
            if not new:
                hint = did_you_mean(pattern, names, count=3) or f" The first layers are {', '.join(names[:3])}."
                raise ValueError(f"quant.rules.{label}.match: {pattern!r} matches no layer.{hint}")
        matches += new
    if not matches:
        present = [f"role:{role}" for role, layers in roles_of_model.items() if set(layers) & set(names)]
        raise ValueError(f"quant.rules.{label}.match: no layer of this model that can be quantized has "
                         f"{' or '.join(absent)}; it has {', '.join(present) or 'no roles'}. "
                         f"quant.rules.{label}.enabled=false disables the rule")
    return matches
