"""Which layer gets which quantizer and how many bits: named rules over module names and roles.

Rules are a mapping, in order, first match wins; what a rule leaves open comes from the policy's own defaults.
They have names because module names contain dots: `quant.rules.edges.bits=4` works on a command line.

A pattern is a module name with shell wildcards (`features.stage1.*`) or a role:

    role:first  the first convolution or linear layer     role:last  the last one

A pattern that matches no layer is an error that lists the near misses. Plain dataclasses: needs torch alone.
"""

import difflib
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nulsq.quant.layers import QUANTIZED

LAYER_ROLES = ("first", "last")
FLOAT = "fp"  # the name of "no quantizer"


@dataclass(frozen=True)
class SideRule:
    """One side (weight or activation) of a layer. None means: as the rule, or the policy, says."""

    quantizer: str | None = None
    bits: int | None = field(default=None, metadata={"low": 1, "high": 8})
    signed: bool | None = None
    per_channel: bool | None = None
    init: str | None = None
    grad_scale: str | None = None
    ste: str | None = None
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

    def resolve(self, model: nn.Module) -> dict[str, tuple[SideRule, SideRule]]:
        """Each quantizable layer's (weight, activation) settings, complete, by module name.

        Raises ValueError for a pattern that matches nothing.
        """
        names = quantizable(model)
        if not names:
            raise ValueError("the model has no Conv2d or Linear layer to quantize")
        roles = {f"role:{role}": {names[0 if role == "first" else -1]} for role in LAYER_ROLES}
        chosen: dict[str, str] = {}
        for label, rule in self.rules.items():
            if not rule.enabled:
                continue
            wanted = [name for pattern in rule.match for name in _matches(label, pattern, names, roles)]
            for name in wanted:
                chosen.setdefault(name, label)
            if wanted and label not in chosen.values():
                earlier = ", ".join(sorted({chosen[name] for name in wanted}))
                raise ValueError(f"quant.rules.{label} changes nothing: its layers were taken by {earlier}, which "
                                 f"comes first. Set quant.rules.{earlier.partition(',')[0]}, or its enabled=false")
        rules = {name: self.rules[label] for name, label in chosen.items()}
        return {name: tuple(self._side(side, rules.get(name, LayerRule())) for side in ("weight", "activation"))
                for name in names}

    def _side(self, side: str, rule: LayerRule) -> SideRule:
        own, default = getattr(rule, side), getattr(self, side)
        quantizer = own.quantizer or rule.quantizer or default.quantizer or FLOAT
        # Settings of the default side belong to its quantizer: another quantizer starts from its own defaults.
        inherited = default if quantizer == (default.quantizer or FLOAT) else SideRule()
        settled = {f.name: getattr(inherited, f.name) if getattr(own, f.name) is None else getattr(own, f.name)
                   for f in fields(SideRule)}
        bits = own.bits or rule.bits or default.bits or self.bits
        return SideRule(**settled | {"quantizer": quantizer, "bits": bits,
                                     "options": {**inherited.options, **own.options}})


def quantizable(model: nn.Module) -> list[str]:
    """Names of the layers that can be quantized, in the order of definition.

    Exactly Conv2d and Linear: a subclass may use its weight in ways of its own, so it stays float (`summary`
    lists it).
    """
    return [name for name, module in model.named_modules() if type(module) in QUANTIZED]


def _matches(label, pattern, names, roles):
    if pattern.startswith("role:"):
        if pattern not in roles:
            raise ValueError(f"quant.rules.{label}.match: no role {pattern!r}, allowed: {', '.join(roles)}")
        return roles[pattern]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, names, 3, 0.4) or names[:3]
        raise ValueError(f"quant.rules.{label}.match: {pattern!r} matches no layer; near: {', '.join(near)}")
    return found
