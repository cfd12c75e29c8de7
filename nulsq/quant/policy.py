"""Which layer gets which quantizer and how many bits: named rules over module names and roles.

Rules are a mapping, in order, first match wins; what a rule leaves open comes from the policy's own defaults.
They have names because module names contain dots: `quant.rules.edges.bits=4` works on a command line.

A pattern is a module name with shell wildcards (`features.stage1.*`) or a role (`roles` says how each is found):

    role:first, role:last   the first and the last convolution or linear layer
    role:depthwise          convolutions of one input channel each
    role:downsample         on the way from one resolution to the next: projection shortcuts, patch merging
    role:qkv                projections of an attention's input to queries, keys and values

What matches nothing is an error. One exception, for a search over several models: a role that this model does not
have is passed over where another entry of the same rule matches.

A preset is a word for what most policies differ in:

    paper          the rules as they stand; by default `edges`: first and last layer 8-bit MinMax
    none           without the rule `edges`: every layer at `bits`
    weights_only   activations float everywhere; weights as the rules say

Plain dataclasses: needs torch alone.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nulsq.quant.layers import NORMALIZATIONS, QUANTIZED

FLOAT = "fp"  # the name of "no quantizer"
PRESETS = ("paper", "none", "weights_only")
SHORTCUTS = {"downsample", "identity_conv", "shortcut"}
PROJECTIONS = {"qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "query", "key", "value"}


@dataclass(frozen=True)
class SideRule:
    """One side (weight or activation) of a layer. None means: as the rule, or the policy, says.

    Where nobody says: signed from the data, one set of steps per tensor, the quantizer's own initializer, gradient
    scale and straight-through rule. `normalization` (weights only, see `nulsq.quant.layers`): the quantizer's own.
    `learn_scale` false: the quantizer's parameters stay as calibrated.
    """

    quantizer: str | None = None
    bits: int | None = field(default=None, metadata={"low": 1, "high": 8})
    signed: bool | None = None
    per_channel: bool | None = None
    init: str | None = None
    grad_scale: str | None = None
    ste: str | None = None
    normalization: str | None = None
    learn_scale: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRule:
    """For the layers that `match`: a quantizer and bits for both sides, or each side's own."""

    match: list[str] = field(default_factory=list)
    enabled: bool = True
    quantizer: str | None = None
    bits: int | None = field(default=None, metadata={"low": 1, "high": 8})
    weight: SideRule = field(default_factory=SideRule)
    activation: SideRule = field(default_factory=SideRule)


def _edges() -> dict[str, LayerRule]:
    return {"edges": LayerRule(match=["role:first", "role:last"], quantizer="minmax", bits=8)}


@dataclass(frozen=True)
class Policy:
    """Defaults for every layer and rules for some. As it stands: the paper's W2A2, first and last layer 8 bits."""

    bits: int = field(default=2, metadata={"help": "of weights and activations that say nothing else",
                                           "low": 1, "high": 8})
    weight: SideRule = field(default_factory=lambda: SideRule(quantizer="lsq"))
    activation: SideRule = field(default_factory=lambda: SideRule(quantizer="nulsq"))
    rules: dict[str, LayerRule] = field(default_factory=_edges)
    preset: str = field(default="paper", metadata={
        "help": "paper: as the rules say (edges: first and last layer 8 bits); none: no edges; weights_only: "
                "activations float"})

    def resolve(self, model: nn.Module) -> dict[str, tuple[SideRule, SideRule]]:
        """Each quantizable layer's (weight, activation) settings, complete, by module name.

        Raises ValueError for a pattern or role that matches nothing, and for settings that contradict each other.
        """
        names = quantizable(model)
        if not names:
            raise ValueError("the model has no Conv2d or Linear layer to quantize")
        policy, found = self.without_preset(), roles(model)
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
        return {name: (policy._side("weight", chosen.get(name)), policy._side("activation", chosen.get(name)))
                for name in names}

    def without_preset(self) -> "Policy":
        """The same policy with its preset written out as sides and rules.

        Raises ValueError for an unknown preset and for rules that contradict it.
        """
        _known("quant.preset", self.preset, PRESETS)
        rules = dict(self.rules)
        if self.preset == "none":
            edges = rules.pop("edges", None)
            if edges is not None and edges.enabled and edges != _edges()["edges"]:
                raise ValueError("quant.preset = none takes the rule edges away, but quant.rules.edges was changed: "
                                 "take quant.preset=paper, or give the rule a name of your own")
            return replace(self, preset="paper", rules=rules)
        if self.preset == "weights_only":
            for label, rule in rules.items():
                for key in ("quantizer", "bits"):
                    value = getattr(rule.activation, key)
                    if rule.enabled and value not in (None, FLOAT):
                        raise ValueError(f"quant.preset = weights_only leaves activations float, but quant.rules."
                                         f"{label}.activation.{key} = {value}; choose one")
                rules[label] = replace(rule, activation=SideRule(quantizer=FLOAT))
            return replace(self, preset="paper", activation=SideRule(quantizer=FLOAT), rules=rules)
        return self

    def _side(self, side: str, label: str | None) -> SideRule:
        rule = self.rules[label] if label else LayerRule()
        own, default = getattr(rule, side), getattr(self, side)
        quantizer = own.quantizer or rule.quantizer or default.quantizer or FLOAT
        # Settings of the default side belong to its quantizer: another quantizer starts from its own defaults.
        inherited = default if quantizer == (default.quantizer or FLOAT) else SideRule()
        settled = {f.name: getattr(inherited, f.name) if getattr(own, f.name) is None else getattr(own, f.name)
                   for f in fields(SideRule)}
        if settled["normalization"] is not None:
            key = f"quant.{f'rules.{label}.' if own.normalization is not None else ''}{side}.normalization"
            if side == "activation":
                raise ValueError(f"{key} = {settled['normalization']}: only weights are normalized")
            _known(key, settled["normalization"], NORMALIZATIONS)
        bits = own.bits or rule.bits or default.bits or self.bits
        return SideRule(**settled | {"quantizer": quantizer, "bits": bits,
                                     "options": {**inherited.options, **own.options}})


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
        near = difflib.get_close_matches(label, others, 1, 0.6)
        raise ValueError(f"quant.rules.{label}.match is empty: the rule has no layers."
                         + (f" Did you mean quant.rules.{near[0]}?" if near else ""))
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
                near = difflib.get_close_matches(pattern, names, 3, 0.4) or names[:3]
                raise ValueError(f"quant.rules.{label}.match: {pattern!r} matches no layer; near: {', '.join(near)}")
        wanted += matched
    if not wanted:
        here = [f"role:{role}" for role, layers in found.items() if set(layers) & set(names)]
        raise ValueError(f"quant.rules.{label}.match: no layer of this model that can be quantized has "
                         f"{' or '.join(absent)}; it has {', '.join(here) or 'no roles'}. "
                         f"quant.rules.{label}.enabled=false takes the rule away")
    return wanted


def _known(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value).lower(), allowed, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key} = {value!r}.{hint} Allowed: {', '.join(allowed)}")
