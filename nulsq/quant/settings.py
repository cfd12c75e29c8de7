"""Settings of quantization: plain dataclasses and the allowed names. Needs nothing, not even torch.

Recipes consist of these dataclasses, so `--help`, a launcher and a search read and check them without loading torch.
`nulsq.quant.policy` applies them to a network.

Rules are an ordered mapping; the first rule that matches a layer wins. What a rule does not set comes from the defaults
of the policy. Rules have names so that a command line can address them: `quant.rules.edges.bits=4`.

A preset selects a variant of the rules:

    paper          the rules unchanged; the default rule `edges` makes the first and the last layer 8-bit MinMax
    none           the rules without `edges`: every layer gets `bits`
    weights_only   activations stay float in every layer, weights follow the rules
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from nulsq.errors import did_you_mean

FLOAT = "fp"  # in the place of a quantizer's name: none
PRESETS = ("paper", "none", "weights_only")
INITIALIZERS = ("mse", "nmse", "lsq", "const")  # see `nulsq.quant.calibration.initial_step`
OLD_INITIALIZERS = {"lloyd_max": "mse"}  # name in earlier recipes -> name
GRAD_SCALES = ("none", "lsq", "channels", "batch")  # see `nulsq.quant.base.Quantizer`
STE_RULES = ("clip", "clip_open", "half", "none")  # see `nulsq.quant.op.Rule`
NORMALIZATIONS = ("none", "wn", "lwn")  # see `nulsq.quant.layers`


@dataclass(frozen=True)
class SideRule:
    """One side (weight or activation) of a layer. None: not set here, so the rule or the policy decides.

    Where none of them sets a value, the sign comes from the data, there is one set of steps per tensor, and the
    initializer, gradient scale, straight-through rule and normalization (of weights, see `nulsq.quant.layers`) are the
    quantizer's own. `learn_scale: false` keeps the quantizer's parameters as calibrated.
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
    """Settings for the layers that `match`: a quantizer and bits for both sides, or for each side."""

    match: list[str] = field(default_factory=list)
    enabled: bool = True
    quantizer: str | None = None
    bits: int | None = field(default=None, metadata={"low": 1, "high": 8})
    weight: SideRule = field(default_factory=SideRule)
    activation: SideRule = field(default_factory=SideRule)


EDGES = "edges"  # name of the only default rule


def default_rules() -> dict[str, LayerRule]:
    """The rule `edges`: 8-bit MinMax for the first and the last layer, as in the paper."""
    return {EDGES: LayerRule(match=["role:first", "role:last"], quantizer="minmax", bits=8)}


@dataclass(frozen=True)
class Policy:
    """Defaults for every layer and rules for some. The default policy is the paper's W2A2 with 8-bit edges."""

    bits: int = field(default=2, metadata={"help": "of weights and activations that set nothing else",
                                           "low": 1, "high": 8})
    weight: SideRule = field(default_factory=lambda: SideRule(quantizer="lsq"))
    activation: SideRule = field(default_factory=lambda: SideRule(quantizer="nulsq"))
    rules: dict[str, LayerRule] = field(default_factory=default_rules)
    preset: str = field(default="paper", metadata={
        "help": "paper: the rules unchanged (edges: first and last layer 8 bits); none: without edges; weights_only: "
                "float activations"})

    def without_preset(self) -> "Policy":
        """The same policy with its preset expanded into sides and rules.

        Raises ValueError for an unknown preset and for rules that contradict it.
        """
        _known("quant.preset", self.preset, PRESETS)
        rules = dict(self.rules)
        if self.preset == "none":
            edges = rules.pop(EDGES, None)
            if edges is not None and edges.enabled and edges != default_rules()[EDGES]:
                raise ValueError("quant.preset = none removes the rule edges, but quant.rules.edges was changed: "
                                 "use quant.preset=paper, or give the rule another name")
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

    def side(self, side: str, label: str | None) -> SideRule:
        """All settings of one side of a layer. label: the rule that the layer matches, None where it matches none."""
        rule = self.rules[label] if label else LayerRule()
        own, default = getattr(rule, side), getattr(self, side)
        quantizer = own.quantizer or rule.quantizer or default.quantizer or FLOAT
        # Settings of the default side belong to its quantizer: another quantizer starts from its own defaults.
        inherited = default if quantizer == (default.quantizer or FLOAT) else SideRule()
        merged = {f.name: getattr(inherited, f.name) if getattr(own, f.name) is None else getattr(own, f.name)
                  for f in fields(SideRule)}
        if merged["normalization"] is not None:
            key = f"quant.{f'rules.{label}.' if own.normalization is not None else ''}{side}.normalization"
            if side == "activation":
                raise ValueError(f"{key} = {merged['normalization']}: only weights are normalized")
            _known(key, merged["normalization"], NORMALIZATIONS)
        bits = own.bits or rule.bits or default.bits or self.bits
        return SideRule(**merged | {"quantizer": quantizer, "bits": bits,
                                    "options": {**inherited.options, **own.options}})


@dataclass(frozen=True)
class OscillationSettings:
    """Tracking, dampening and freezing of oscillating weights, see `nulsq.quant.oscillation`; off by default."""

    track: bool = field(default=False, metadata={
        "help": "count weights that oscillate between levels; dampening and freezing imply it"})
    momentum: float = field(default=0.01, metadata={
        "help": "weight of a step in the moving averages of oscillation frequency and level", "above": 0, "high": 1})
    dampening: float = field(default=0.0, metadata={
        "help": "final weight of the loss that pulls weights to their levels; 0: none", "low": 0})
    aggregate: Literal["kernel_mean", "sum", "mean"] = field(default="kernel_mean", metadata={
        "help": "how that loss is reduced over a layer; kernel_mean: sum over output channels, mean over the rest"})
    freeze_threshold: float | None = field(default=None, metadata={
        "help": "freeze weights that oscillate more often; null: never. At least 2 momentum", "above": 0, "high": 1})
    freeze_final: float | None = field(default=None, metadata={
        "help": "final value of the threshold; default: it stays constant", "above": 0, "high": 1})
    start: float = field(default=0.25, metadata={
        "help": "share of training before dampening and freezing start", "low": 0, "high": 0.999})
    max_bits: int = field(default=4, metadata={"help": "weights of more bits are not tracked", "low": 1, "high": 8})
    oscillating_above: float = field(default=0.005, metadata={
        "help": "frequency above which the log counts a weight as oscillating", "low": 0, "high": 1})

    @property
    def on(self) -> bool:
        return self.track or self.dampening > 0 or self.freeze_threshold is not None

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        first, final, smallest = self.freeze_threshold, self.freeze_final, 2 * self.momentum
        if first is None and final is not None:
            raise ValueError(f"oscillation.freeze_final = {final} needs oscillation.freeze_threshold")
        if not self.on and self != OscillationSettings():
            raise ValueError("oscillation settings change nothing while nothing is tracked: set oscillation.track, "
                             "oscillation.dampening or oscillation.freeze_threshold")
        if first is None:
            return
        for key, value in (("freeze_threshold", first), ("freeze_final", first if final is None else final)):
            if value < smallest:
                raise ValueError(f"oscillation.{key} = {value}, allowed: at least 2 oscillation.momentum = "
                                 f"{smallest:g}, since one oscillation raises the frequency by the momentum and a "
                                 "frozen weight stays frozen; raise it or lower the momentum")
        if final is not None and final > first:
            raise ValueError(f"oscillation.freeze_final = {final}, allowed: at most oscillation.freeze_threshold = "
                             f"{first}, because the threshold only falls")


def _known(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} = {value!r}.{did_you_mean(str(value).lower(), allowed)} Allowed: {', '.join(allowed)}")
