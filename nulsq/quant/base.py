"""The contract of a quantizer.

A quantizer is a module that maps a float tensor to its fake-quantized values. It owns its parameters (raw float32 step
sizes) and *declares* what they mean: `table()` returns levels and thresholds, class attributes select static rules, and
`nulsq.quant.op` computes outputs and gradients. A quantizer that needs another gradient overrides `forward`. All other
code, exporters included, uses only `levels`, `thresholds`, `encode`, `decode` and `reset_`.

Two things come from data: the steps, and the sign of an activation quantizer built with `signed=None`. `reset_` sets
both; `calibrate_` calls it. Until then `forward` raises an error. Both are part of the state dict, see
`nulsq.quant.state`.

Steps stay positive because they are projected after the optimizer's step (`after_step_`, see `nulsq.quant.projection`),
and before a forward pass if something else wrote them. NaN in the input stays NaN in the output.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nulsq.quant.calibration.histogram import LARGEST
from nulsq.quant.calibration.initial_step import SMALLEST_STEP, initial_step
from nulsq.quant.calibration.least_squares import best_step, lloyd_max
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import Rule, Table, encode, fake_quantize
from nulsq.quant.settings import GRAD_SCALES, INITIALIZERS, OLD_INITIALIZERS, STE_RULES
from nulsq.quant.state import QuantizerState, project_

if TYPE_CHECKING:
    from nulsq.quant.fold import AbsorbedBatchNorm2d, AbsorbedReLU

ROLES = ("weight", "activation")


class Quantizer(QuantizerState):
    """Base class of all quantizers.

    Args:
        bits: 1 to 8; at most 2^bits levels.
        role: "weight" or "activation".
        signed: whether negative values have levels. Weights: always. Activations: None lets `reset_` decide by the
            minimum of the data.
        channels: number of output channels (dimension 0) that get a set of steps each; None for one set per tensor.
        init: how initial step sizes are computed, see `nulsq.quant.calibration.initial_step`. None: `mse`, and `nmse`
            in the calibration protocol "reference".
        grad_scale: factor on the gradient of the steps. "none": 1. "lsq": 1/sqrt(N Qp) of the LSQ paper, where N is
            the number of weights, or of features of one sample. The others differ in N for activations: "channels" is
            the number of input channels, as in the reference implementation of nuLSQ; "batch" is the number of
            elements of the global batch, as in UniQ and lsq-net.
        ste: dL/dx at and beyond the ends of the range, see `nulsq.quant.op.Rule`; None selects the method's own.

    Raises:
        ValueError: a value that the method does not support; the message names the allowed ones.
    """

    index = "uniform"
    ste = "clip"
    reduction = "total"
    symmetric = False  # whether signed grids have as many levels below zero as above it: 2^bits - 1, not 2^bits
    shift = 0.0  # offset of the levels of a "uniform" grid from multiples of the step, in steps
    segments = 0  # equal segments of the range at whose ends the gradient changes too, for reduction "per_cell"
    free_levels = False  # whether `set_levels_` takes any ascending levels around zero, with thresholds halfway
    smallest_bits, largest_bits = 2, 8  # smallest_bits is for signed grids; unsigned ones start at 1 bit
    normalization = "none"  # of the weight before quantization, as published; done by the layer

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 init: str | None = None, grad_scale: str = "none", ste: str | None = None):
        _one_of("role", role, ROLES)
        init = OLD_INITIALIZERS.get(init or "", init)
        _one_of("init", init or "mse", INITIALIZERS)
        _one_of("grad_scale", grad_scale, GRAD_SCALES)
        _one_of("ste", self.ste if ste is None else ste, STE_RULES)
        if role == "weight":
            if signed is False:
                raise ValueError(f"{self.name()}: signed = False, allowed for weights: True (they have both signs)")
            signed = True
        smallest = self.smallest_bits if signed else 1
        if not isinstance(bits, int) or isinstance(bits, bool) or not smallest <= bits <= self.largest_bits:
            raise ValueError(f"{self.name()}: bits = {bits!r}, allowed for {role}s: {smallest} to {self.largest_bits}")
        if role == "activation" and channels is not None:
            raise ValueError(f"{self.name()}: per-channel steps are defined for weights only, not for activations")
        super().__init__(bits, role, signed)
        self.channels = channels
        # What `nulsq.quant.fold` folded into this quantizer: at most one of each, in tuples to be no submodules
        self.batch_norm: tuple[AbsorbedBatchNorm2d, ...] = ()
        self.relu: tuple[AbsorbedReLU, ...] = ()
        self.batch_shards = 1  # number of inputs of this size in the global batch: ranks x micro-batches
        self.init, self.grad_scale = init, grad_scale
        self.ste = self.ste if ste is None else ste
        self.channel_dimension = 1  # of activations; a linear layer sets it to the last dimension

    # ---- what a quantizer file declares ----

    def table(self, elements: int | None = None) -> Table:
        """Levels and thresholds as functions of the parameters.

        elements: N of the gradient scale; None where the gradient is not scaled.
        """
        raise NotImplementedError

    def set_steps_(self, step: Tensor) -> None:
        """Fill the parameters from one common initial step, [] or [C]. Called under no_grad."""
        raise NotImplementedError

    def set_levels_(self, levels: Tensor) -> None:
        """Fill the parameters from ascending levels [L] or [C, L], one of them zero. Needed where `free_levels`."""
        raise NotImplementedError

    def ties_up(self) -> tuple[bool, ...]:
        """For `index == "table"`: per threshold, whether x at the threshold belongs to the upper level."""
        return ()

    @property
    def level_range(self) -> tuple[int, int]:
        """Numbers of the lowest and of the highest level, counted from zero.

        (0, 2^b - 1) unsigned; signed (-2^(b-1), 2^(b-1) - 1), or (-2^(b-1) + 1, 2^(b-1) - 1) where `symmetric`.
        """
        return self.level_range_of(self.signed)

    def level_range_of(self, signed: bool | None) -> tuple[int, int]:
        if not signed:
            return 0, 2**self.bits - 1
        highest = 2 ** (self.bits - 1) - 1
        return (-highest if self.symmetric else -highest - 1), highest

    # ---- what other code uses ----

    def forward(self, x: Tensor) -> Tensor:
        self.prepare_()
        affine = None
        for norm in self.batch_norm:
            affine = norm.affine_of(x, self)
        return fake_quantize(x, self.table(self._elements(x)), self.rule(), affine=affine)

    def received(self, x: Tensor) -> Tensor:
        """What `forward(x)` quantizes: x after the batch norm and the ReLU whose work this quantizer does."""
        for norm in self.batch_norm:
            affine = norm.affine_of(x, self)
            x = x if affine is None else affine.of(x)
        return x.relu() if self.does_relu() else x

    def does_relu(self) -> bool:
        """Whether x counts as max(x, 0), see `nulsq.quant.fold`."""
        return any(relu.absorption.active for relu in self.relu)

    def rule(self) -> Rule:
        return Rule(self.index, self.ste, self.reduction, self.level_range, self.ties_up(), self.shift, self.segments,
                    self.does_relu())

    @torch.no_grad()
    def levels(self) -> Tensor:
        """Output values, ascending: [L], or [C, L] per channel. L is at most 2^bits."""
        self.prepare_()
        return self.levels_of(self.table())

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """Decision boundaries between neighbouring levels, ascending: [L-1] or [C, L-1]."""
        self.prepare_()
        return self.thresholds_of(self.table())

    @property
    def has_steps(self) -> bool:
        """Whether there are parameters to initialize (MinMax has none)."""
        return any(True for _ in self.parameters())

    def set_range_(self, x: Tensor) -> None:
        """Make `levels` those of this tensor, where they depend on each tensor ("dynamic" MinMax)."""

    def levels_of(self, table: Table) -> Tensor:
        if table.levels is not None:
            return table.levels.clone()
        low, high = self.level_range
        return table.gaps * (torch.arange(low, high + 1, device=table.gaps.device) + self.shift)

    def thresholds_of(self, table: Table) -> Tensor:
        if table.thresholds is not None:
            return table.thresholds.clone()
        low, high = self.level_range
        return table.gaps * (torch.arange(low, high, device=table.gaps.device) + self.shift + 0.5)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Index of the level of each element, int64: `decode(encode(x)) == forward(x)` bit for bit in float32.

        Raises ValueError where x has NaN or infinite elements.
        """
        self.prepare_()
        not_finite = ~torch.isfinite(x)
        if not_finite.any():
            raise ValueError(f"{self.name()}.encode: {int(not_finite.sum())} of {x.numel()} elements are NaN or "
                             "infinite")
        return self.level_index(x)

    @torch.no_grad()
    def level_index(self, x: Tensor) -> Tensor:
        """As `encode`, without the check and its device synchronization; the index of a NaN is arbitrary."""
        return encode(x, self.table(), self.rule())

    @torch.no_grad()
    def decode(self, index: Tensor) -> Tensor:
        """Values of level indices, any shape; dimension 0 is the channel of per-channel quantizers."""
        levels = self.levels()
        if levels.dim() == 1:
            return levels[index]
        return levels.gather(1, index.flatten(1)).view(index.shape)

    @torch.no_grad()
    def reset_(self, statistics: Statistics, init: str | None = None) -> None:
        """Set the sign, unless it was configured, and the initial steps from statistics of this quantizer's input.

        Args:
            statistics: per channel ([C]) where the quantizer has `channels`, else per tensor ([]).
            init: None takes the quantizer's own; without one, that of the statistics.

        Raises:
            ValueError: negative values at fewer bits than a signed grid needs; for `mse`, statistics without a
                histogram or values that exceed its range.
        """
        init = init or self.init or statistics.default_init
        histogram = statistics.histogram
        signed = bool((statistics.low < 0).any()) if self.configured_sign is None else self.configured_sign
        if signed and self.bits < self.smallest_bits:
            raise ValueError(f"{self.name()}: the input has negative values (minimum {statistics.low.min():.3g}); "
                             f"a signed grid needs at least {self.smallest_bits} bits, not {self.bits}")
        self.set_sign_(signed)
        if init != "mse":
            self.set_steps_(initial_step(init, statistics, self.level_range[1], self.role, signed).to(torch.float32))
        elif self.has_steps:
            if histogram is None:
                raise ValueError("init = mse needs statistics with a histogram, but these were made without")
            if statistics.largest.max() >= LARGEST:
                raise ValueError(f"init = mse: values up to {statistics.largest.max():.3g}, allowed: below {LARGEST:g}")
            step = best_step(self, histogram, statistics.largest).clamp(min=SMALLEST_STEP)
            self.set_steps_(step.to(torch.float32))
            if self.free_levels:
                start = self.levels_of(self.table())
                self.set_levels_(lloyd_max(histogram, statistics.square, start,
                                           -self.level_range[0]).to(torch.float32))
        project_([self])
        self.mark_calibrated_()

    @torch.no_grad()
    def after_step_(self) -> None:
        """Called after every optimizer step. Projects the steps to positive values; NaN stays NaN."""
        project_([self])

    def extra_repr(self) -> str:
        sign = {None: "sign from data", True: "signed", False: "unsigned"}[self.signed]
        per = f"{self.channels} channels" if self.channels else "per tensor"
        absorbed = f", absorbs {', '.join(self.absorbed())}" if self.absorbed() else ""
        return f"bits={self.bits}, {self.role}, {sign}, {per}, grad_scale={self.grad_scale}{absorbed}"

    def gradient_factor(self, elements: int | None, levels: int, numerator: float = 1.0) -> float:
        """numerator / sqrt(N Q), where N is `elements` and Q is `levels`; 1 where the gradient is not scaled."""
        return 1.0 if not elements else numerator / (elements * max(levels, 1)) ** 0.5  # 0: an empty tensor

    def absorbed(self) -> list[str]:
        """The batch norm and the ReLU whose work this quantizer does, as "name (class)", in order of execution."""
        modules: list[Any] = [*self.batch_norm, *self.relu]
        return [f"{module.absorption.name} ({module.unfolded_class.__name__})" for module in modules]

    def _elements(self, x: Tensor) -> int | None:
        if self.grad_scale == "none":
            return None
        if self.role == "weight":
            return x.numel() // (self.channels or 1)
        if self.grad_scale == "batch":
            return x.numel() * self.batch_shards
        return x.shape[self.channel_dimension] if self.grad_scale == "channels" else math.prod(x.shape[1:])


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} = {value!r}, allowed: {', '.join(allowed)}")
