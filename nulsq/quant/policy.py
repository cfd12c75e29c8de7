"""Which layer gets which quantizer and how many bits: the rules of a `Policy` against a network's names and roles.

A pattern is a module name with shell wildcards (`features.stage1.*`) or a role (`roles` says how each is found):

    role:first, role:last   the first and the last convolution or linear layer
    role:depthwise          convolutions of one input channel each
    role:downsample         on the way from one resolution to the next: projection shortcuts, patch merging
    role:qkv                projections of an attention's input to queries, keys and values

What matches nothing is an error. One exception, for a search over several models: a role that this model does not
have is passed over where another entry of the same rule matches.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from nulsq.errors import did_you_mean
from nulsq.quant.layers import QUANTIZED
from nulsq.quant.settings import LayerRule, Policy, SideRule

SHORTCUTS = {"downsample", "identity_conv", "shortcut"}
PROJECTIONS = {"qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "query", "key", "value"}


def resolve(policy: Policy, model: nn.Module) -> dict[str, tuple[SideRule, SideRule]]:
    """Each quantizable layer's (weight, activation) settings, complete, by module name.

    Raises ValueError for a pattern or role that matches nothing, and for settings that contradict each other.
    """
    names = quantizable(model)
    if not names:
        raise ValueError("the model has no Conv2d or Linear layer to quantize")
    policy, found = policy.without_preset(), roles(model)
    chosen: dict[str, str] = {}
    for label, rule in policy.rules.items():
        if not rule.enabled:
            continue
        wanted = _wanted(label, rule, names, found, others=policy.rules.keys() - {label})
        for name in wanted:
            chosen.setdefault(name, label)
        if label not in chosen.values():
            earlier = ", ".join(sorted({chosen[name] for name in wanted}))
            raise ValueError(f"quant.rules.{label} changes nothing: its layers were taken by {earlier}, which "
                             f"comes first. Set quant.rules.{earlier.partition(',')[0]}, or its enabled=false")
    return {name: (policy.side("weight", chosen.get(name)), policy.side("activation", chosen.get(name)))
            for name in names}


def quantizable(model: nn.Module) -> list[str]:
    """Names of the layers that can be quantized, in the order of definition.

    Exactly Conv2d and Linear: a subclass may use its weight in ways of its own (timm's Conv2dSame pads, its StdConv2d
    normalizes, torch's attention never calls its output layer), so it stays float; `quantize_` warns of it.
    """
    return [name for name, module in model.named_modules() if type(module) in QUANTIZED]


def roles(model: nn.Module) -> dict[str, list[str]]:
    """Names of the layers of each role, in the order of definition; float or quantized. A layer may have several.

    All convolutions and linear layers count, those too that cannot be quantized: where the first layer is one of
    these, the second does not become the first. `first` and `last` are by definition order, `depthwise` by shape,
    `downsample` and `qkv` by the names that the three model libraries use.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    names = list(layers)
    return {
        "first": names[:1],
        "last": names[-1:],
        "depthwise": [name for name, layer in layers.items()
                      if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1],
        "downsample": [name for name in names if SHORTCUTS & set(name.split("."))],
        "qkv": [name for name in names if name.rpartition(".")[2] in PROJECTIONS],
    }


def _wanted(label: str, rule: LayerRule, names: list[str], found: dict[str, list[str]],
            others: Iterable[str]) -> list[str]:
    """Names of the quantizable layers that a rule matches: at least one."""
    if not rule.match:
        raise ValueError(f"quant.rules.{label}.match is empty: the rule has no layers."
                         f"{did_you_mean(label, others, cutoff=0.6)}")
    wanted, absent = [], []
    for pattern in rule.match:
        if pattern.startswith("role:"):
            role = pattern.removeprefix("role:")
            if role not in found:
                raise ValueError(f"quant.rules.{label}.match: no role {pattern!r}, allowed: "
                                 f"{', '.join(f'role:{each}' for each in found)}")
            matched = [name for name in names if name in found[role]]
            if not matched:
                absent.append(pattern)
        else:
            matched = [name for name in names if fnmatchcase(name, pattern)]
            if not matched:
                hint = did_you_mean(pattern, names, count=3) or f" The first layers are {', '.join(names[:3])}."
                raise ValueError(f"quant.rules.{label}.match: {pattern!r} matches no layer.{hint}")
        wanted += matched
    if not wanted:
        here = [f"role:{role}" for role, layers in found.items() if set(layers) & set(names)]
        raise ValueError(f"quant.rules.{label}.match: no layer of this model that can be quantized has "
                         f"{' or '.join(absent)}; it has {', '.join(here) or 'no roles'}. "
                         f"quant.rules.{label}.enabled=false takes the rule away")
    return wanted
