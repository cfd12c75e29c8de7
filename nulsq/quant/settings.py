"""What can be set about quantization: plain dataclasses and the names that are allowed. Needs nothing, not even torch.

Recipes are made of these, so `--help`, a launcher and a search read and check them without loading torch. What they
mean for a network is `nulsq.quant.policy`'s to say.

Rules are a mapping, in order, first match wins; what a rule leaves open comes from the policy's own defaults.
They have names because module names contain dots: `quant.rules.edges.bits=4` works on a command line.

A preset is a word for what most policies differ in:

    paper          the rules as they stand; by default `edges`: first and last layer 8-bit MinMax
    none           without the rule `edges`: every layer at `bits`
    weights_only   activations float everywhere; weights as the rules say
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from nulsq.errors import did_you_mean

FLOAT = "fp"  # the name of "no quantizer"
PRESETS = ("paper", "none", "weights_only")
INITIALIZERS = ("nmse", "lsq", "const", "lloyd_max")  # see `nulsq.quant.calibration.initial_step`
GRAD_SCALES = ("none", "lsq", "channels", "batch")  # see `nulsq.quant.base.Quantizer`
STE_RULES = ("clip", "clip_open", "half", "none")  # see `nulsq.quant.op.Rule`
NORMALIZATIONS = ("none", "wn", "lwn")  # see `nulsq.quant.layers`


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

    def side(self, side: str, label: str | None) -> SideRule:
        """One side of a layer that the rule `label` took, or none did: every setting that anybody made."""
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


@dataclass(frozen=True)
class OscillationSettings:
    """What is done about oscillating weights; as it stands, nothing."""

    track: bool = field(default=False, metadata={
        "help": "count weights that oscillate between levels; dampening and freezing imply it"})
    momentum: float = field(default=0.01, metadata={
        "help": "of one step in the oscillation frequency and in the average level", "above": 0, "high": 1})
    dampening: float = field(default=0.0, metadata={
        "help": "final weight of the loss that pulls weights to their levels; 0: none", "low": 0})
    aggregate: Literal["kernel_mean", "sum", "mean"] = field(default="kernel_mean", metadata={
        "help": "of that loss over a layer; kernel_mean: sum over output channels, mean over the rest"})
    freeze_threshold: float | None = field(default=None, metadata={
        "help": "freeze weights that oscillate more often; none: never. At least 2 momentum", "above": 0, "high": 1})
    freeze_final: float | None = field(default=None, metadata={
        "help": "what the threshold falls to at the end; default: it stays", "above": 0, "high": 1})
    start: float = field(default=0.25, metadata={
        "help": "share of training before dampening and freezing start", "low": 0, "high": 0.999})
    max_bits: int = field(default=4, metadata={"help": "weights of more bits are left alone", "low": 1, "high": 8})
    oscillating_above: float = field(default=0.005, metadata={
        "help": "frequency from which the log calls a weight oscillating", "low": 0, "high": 1})

    @property
    def on(self) -> bool:
        return self.track or self.dampening > 0 or self.freeze_threshold is not None

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        first, final, least = self.freeze_threshold, self.freeze_final, 2 * self.momentum
        if first is None and final is not None:
            raise ValueError(f"oscillation.freeze_final = {final} needs oscillation.freeze_threshold")
        if not self.on and self != OscillationSettings():
            raise ValueError("oscillation settings change nothing while nothing is tracked: set oscillation.track, "
                             ".dampening or .freeze_threshold")
        if first is None:
            return
        for key, value in (("freeze_threshold", first), ("freeze_final", first if final is None else final)):
            if value < least:
                raise ValueError(f"oscillation.{key} = {value}, allowed: at least 2 oscillation.momentum = {least:g}, "
                                 "since one oscillation lifts the frequency by the momentum and freezing is for good; "
                                 "raise it or lower the momentum")
        if final is not None and final > first:
            raise ValueError(f"oscillation.freeze_final = {final}, allowed: at most oscillation.freeze_threshold = "
                             f"{first}: the threshold falls")


def _known(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} = {value!r}.{did_you_mean(str(value).lower(), allowed)} Allowed: {', '.join(allowed)}")
