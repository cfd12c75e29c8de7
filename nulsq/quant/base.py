"""The contract of a quantizer.

A quantizer is a module from a float tensor to its fake-quantized self. It owns its parameters (raw float32 step
sizes) and *declares*: `table()` says what levels they mean, class attributes say which static rules hold, and
`nulsq.quant.op` executes. One that needs a gradient of its own overrides `forward`; everybody else, exporters
included, relies on `levels`, `thresholds`, `encode`, `decode` and `reset_` alone.

Two things are settled by data: the sign of an activation quantizer built with `signed=None`, and the steps. Both
come from `reset_`, which `calibrate_` calls; until then `forward` refuses. They are part of the state dict.

Steps stay positive by projection after the optimizer's step (`after_step_`, see `nulsq.quant.projection`), never by a
check in `forward`, which would cost a device synchronization. NaN goes through to the output.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nulsq.quant.calibration.histogram import LARGEST
from nulsq.quant.calibration.initial_step import SMALLEST_STEP, initial_step
from nulsq.quant.calibration.lloyd_max import best_step, lloyd_max
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import Rule, Table, encode, fake_quantize
from nulsq.quant.settings import GRAD_SCALES, INITIALIZERS, STE_RULES

if TYPE_CHECKING:
    from nulsq.quant.fold import AbsorbedBatchNorm2d, AbsorbedReLU

ROLES = ("weight", "activation")


class Quantizer(nn.Module):
    """Base class of all quantizers.

    Args:
        bits: 1 to 8; at most 2^bits levels.
        role: "weight" or "activation".
        signed: whether negative values have levels. Weights: always. Activations: None lets `reset_` decide from
            the data's minimum.
        channels: number of output channels for one set of steps each (dimension 0), or None for one per tensor.
        init: initial step sizes, see `nulsq.quant.calibration.initial_step`.
        grad_scale: factor on the gradient of the steps. "none"; "lsq": 1/sqrt(N Qp) of the LSQ paper, N the number
            of weights or of features of one sample; "channels": the same with N the number of input channels for
            activations, as the reference implementation of nuLSQ has it; "batch": with N the number of elements of
            the whole global batch for activations, as UniQ and lsq-net have it.
        ste: dL/dx at and beyond the ends of the range, see `nulsq.quant.op.Rule`; None takes the method's own.

    Raises:
        ValueError: for a value that the method has no meaning for; the message names the allowed ones.
    """

    index = "uniform"
    ste = "clip"
    reduction = "total"
    shift = 0.0  # of a "uniform" grid: where its levels lie between multiples of the step
    segments = 0  # of the range, where the gradient bends between thresholds too
    free_levels = False  # whether any ascending levels around zero, with thresholds halfway, can be taken on
    smallest_bits, largest_bits = 2, 8  # the smallest for signed grids; unsigned ones start at 1
    normalization = "none"  # of the weight before it is quantized, as the method was published; the layer does it

    def __init__(self, bits: int, role: str, *, signed: bool | None = None, channels: int | None = None,
                 init: str = "nmse", grad_scale: str = "none", ste: str | None = None):
        super().__init__()
        _one_of("role", role, ROLES)
        _one_of("init", init, INITIALIZERS)
        _one_of("grad_scale", grad_scale, GRAD_SCALES)
        _one_of("ste", self.ste if ste is None else ste, STE_RULES)
        if role == "weight":
            if signed is False:
                raise ValueError(f"{self.name()}: signed = False, allowed for weights: True (they have both signs)")
            signed = True
        least = self.smallest_bits if signed else 1
        if not isinstance(bits, int) or isinstance(bits, bool) or not least <= bits <= self.largest_bits:
            raise ValueError(f"{self.name()}: bits = {bits!r}, allowed for {role}s: {least} to {self.largest_bits}")
        if role == "activation" and channels is not None:
            raise ValueError(f"{self.name()}: per-channel steps are defined for weights only, not for activations")
        self.bits, self.role, self.channels = bits, role, channels
        # The batch norm and the ReLU whose work it does, see `nulsq.quant.fold`. At most one each, in a tuple so that
        # they do not become submodules.
        self.batch_norm: tuple[AbsorbedBatchNorm2d, ...] = ()
        self.relu: tuple[AbsorbedReLU, ...] = ()
        self.batch_shards = 1  # how many inputs of this size make the global batch: ranks x micro-batches
        self.init, self.grad_scale = init, grad_scale
        self.ste = self.ste if ste is None else ste
        self.asked_sign = self.signed = signed  # what was asked for stays, `signed` is settled by data
        self.channel_dimension = 1  # of activations; a linear layer's is the last
        self.calibrated = False  # a plain attribute: reading it costs nothing and does not break a compiled graph
        # -1: not calibrated yet, else whether signed; what of the two flags above a state dict carries
        self.register_buffer("sign", torch.tensor(-1, dtype=torch.int8))
        self.register_load_state_dict_post_hook(_read_sign)

    # ---- what a quantizer file declares ----

    def table(self, elements: int | None = None) -> Table:
        """Levels and thresholds as functions of the parameters.

        `elements` is the N of the gradient scale, None where none applies.
        """
        raise NotImplementedError

    def set_steps_(self, step: Tensor) -> None:
        """Fill the parameters from one common initial step, [] or [C]. Called under no_grad."""
        raise NotImplementedError

    def set_levels_(self, levels: Tensor) -> None:
        """Where `free_levels`: fill the parameters from ascending levels [L] or [C, L], one of them zero."""
        raise NotImplementedError

    def ties_up(self) -> tuple[bool, ...]:
        """For `index == "table"`: per threshold, whether x at the threshold belongs to the upper level."""
        return ()

    @property
    def level_range(self) -> tuple[int, int]:
        """Lowest and highest level number, zero being 0: (-2^(b-1), 2^(b-1) - 1) signed, (0, 2^b - 1) unsigned."""
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    # ---- what everybody uses ----

    def forward(self, x: Tensor) -> Tensor:
        self._require_calibrated()
        affine = None
        for norm in self.batch_norm:
            affine = norm.affine_of(x, self)
        return fake_quantize(x, self.table(self._elements(x)), self.rule(), affine=affine)

    def received(self, x: Tensor) -> Tensor:
        """What is quantized of what `forward` is called with: x behind the batch norm and the ReLU left to it."""
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
        self._require_calibrated()
        return self.levels_of(self.table())

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """Decision boundaries between neighbouring levels, ascending: [L-1] or [C, L-1]."""
        self._require_calibrated()
        return self.thresholds_of(self.table())

    def levels_of(self, table: Table) -> Tensor:
        if self.index == "uniform":
            low, high = self.level_range
            return table.gaps * (torch.arange(low, high + 1, device=table.gaps.device) + self.shift)
        return table.levels.clone()

    def thresholds_of(self, table: Table) -> Tensor:
        if self.index == "uniform":
            low, high = self.level_range
            return table.gaps * (torch.arange(low, high, device=table.gaps.device) + self.shift + 0.5)
        return table.thresholds.clone()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Index of the level of each element, int64: `decode(encode(x)) == forward(x)` bit for bit in float32.

        Raises ValueError where x has NaN or infinite elements.
        """
        self._require_calibrated()
        bad = ~torch.isfinite(x)
        if bad.any():
            raise ValueError(f"{self.name()}.encode: {int(bad.sum())} of {x.numel()} elements are NaN or infinite")
        return self.level_index(x)

    @torch.no_grad()
    def level_index(self, x: Tensor) -> Tensor:
        """As `encode`, without the check and its device synchronization; the index of a NaN means nothing."""
        return encode(x, self.table(), self.rule())

    @torch.no_grad()
    def decode(self, index: Tensor) -> Tensor:
        """Values of level indices; along dimension 0 for per-channel quantizers."""
        levels = self.levels()
        if levels.dim() == 1:
            return levels[index]
        return levels.gather(1, index.flatten(1)).view(index.shape)

    @torch.no_grad()
    def reset_(self, statistics: Statistics, init: str | None = None) -> None:
        """Settle the sign (if open) and the initial steps from statistics of this quantizer's input.

        Statistics per channel ([C]) where the quantizer has `channels`, else per tensor ([]).

        Raises ValueError for negative values at one bit where that has no signed grid, and for "lloyd_max" without a
        histogram in the statistics.
        """
        init = init or self.init
        signed = bool((statistics.low < 0).any()) if self.asked_sign is None else self.asked_sign
        if signed and self.bits < self.smallest_bits:
            raise ValueError(f"{self.name()}: the input has negative values (minimum {statistics.low.min():.3g}); "
                             f"a signed grid needs at least {self.smallest_bits} bits, not {self.bits}")
        if init == "lloyd_max" and statistics.histogram is None:
            raise ValueError("init = lloyd_max needs statistics with a histogram: Statistics.of(x, histogram=True)")
        if init == "lloyd_max" and statistics.largest.max() >= LARGEST:
            raise ValueError(f"init = lloyd_max: values up to {statistics.largest.max():.3g}, allowed: below "
                             f"{LARGEST:g}")
        self.signed = signed
        step = initial_step(init, statistics, self.level_range[1], self.role, self.signed)
        if init == "lloyd_max":
            step = best_step(self, statistics.histogram, step).clamp(min=SMALLEST_STEP)
        self.set_steps_(step.to(torch.float32))
        if init == "lloyd_max" and self.free_levels:
            start = self.levels_of(self.table())
            self.set_levels_(lloyd_max(statistics.histogram, start, -self.level_range[0]).to(torch.float32))
        self.mark_calibrated_()

    def mark_calibrated_(self) -> None:
        self.calibrated = True
        self.sign.fill_(int(self.signed))

    @torch.no_grad()
    def after_step_(self) -> None:
        """Called after every optimizer step. Projects the steps to positive values; a NaN stays a NaN."""
        project_([self])

    def positive_parameters(self) -> list[Tensor]:
        """The parameters that have to stay positive: steps and clipping thresholds. All of them, unless overridden."""
        return list(self.parameters(recurse=False))

    @classmethod
    def name(cls) -> str:
        """The name that recipes use: the last part of the module's name."""
        return cls.__module__.rpartition(".")[2]

    def extra_repr(self) -> str:
        sign = {None: "sign from data", True: "signed", False: "unsigned"}[self.signed]
        per = f"{self.channels} channels" if self.channels else "per tensor"
        absorbed = f", absorbs {', '.join(self.absorbed())}" if self.absorbed() else ""
        return f"bits={self.bits}, {self.role}, {sign}, {per}, grad_scale={self.grad_scale}{absorbed}"

    def gradient_factor(self, elements: int | None, codes: int, numerator: float = 1.0) -> float:
        """numerator / sqrt(N Q), or 1 where `grad_scale` is "none" (elements is None)."""
        return 1.0 if elements is None else numerator / (elements * max(codes, 1)) ** 0.5

    def absorbed(self) -> list[str]:
        """The batch norm and the ReLU whose work it does, as "name (class)", in order of execution."""
        return [f"{module.absorption.name} ({module.unfolded_class.__name__})"
                for module in (*self.batch_norm, *self.relu)]

    def _elements(self, x: Tensor) -> int | None:
        if self.grad_scale == "none":
            return None
        if self.role == "weight":
            return x.numel() // (self.channels or 1)
        if self.grad_scale == "batch":
            return x.numel() * self.batch_shards
        return x.shape[self.channel_dimension] if self.grad_scale == "channels" else x[0].numel()

    def _require_calibrated(self) -> None:
        if not self.calibrated:
            raise RuntimeError(f"this {self.name()} {self.role} quantizer has no step sizes yet: "
                               "call nulsq.calibrate_(model, batches) or load a state dict first")


@torch.no_grad()
def project_(quantizers: list[Quantizer]) -> None:
    """Make what has to be positive at least SMALLEST_STEP, in one operation for all of them."""
    parameters = [parameter for quantizer in quantizers for parameter in quantizer.positive_parameters()]
    if parameters:
        torch._foreach_clamp_min_(parameters, SMALLEST_STEP)


def _read_sign(quantizer: Quantizer, incompatible) -> None:
    sign = int(quantizer.sign)
    quantizer.calibrated = sign >= 0
    if quantizer.calibrated:
        quantizer.signed = bool(sign)


def _one_of(what, value, allowed):
    if value not in allowed:
        raise ValueError(f"{what} = {value!r}, allowed: {', '.join(allowed)}")
