"""The divergence guard: it notices that a run goes wrong, and finds the layer that went wrong first.

A step goes wrong when its loss or the norm of its gradients is not finite, or when the loss exceeds `guard.spike` times
the running mean of the good losses before it and also ln(classes), the loss of guessing. Both numbers stay on the
device; the host reads them once in `guard.every` steps, before every checkpoint (so that no checkpoint holds a network
that has gone bad), and at each step after a roll-back. The running mean depends on the losses alone, not on when they
are read: an interrupted run decides as the uninterrupted one does.
"""

import math

import torch
from torch import Tensor, nn

from nulsq.config import Guard
from nulsq.distributed import Ranks
from nulsq.quant.base import Quantizer
from nulsq.quant.modes import in_evaluation

DECAY = 0.95  # of the running mean of good losses, per step
WARM_UP = 20  # good losses before a jump counts as a divergence


class Diverged(Exception):
    """A step went wrong; `step` is the first one that did. Raised on every rank."""

    def __init__(self, step: int):
        super().__init__(f"step {step} went wrong")
        self.step = step


class DivergenceGuard:
    """Watches the steps of one run. All ranks make the same calls and get the same answers.

    Attributes:
        loss_ema: the running mean of the good losses; part of the run's state, as is
        good_losses: how many there were.
    """

    def __init__(self, settings: Guard, classes: int, ranks: Ranks):
        self.settings, self.ranks = settings, ranks
        self.guessing = math.log(classes)
        self.loss_ema, self.good_losses = 0.0, 0
        self.pending = torch.zeros(settings.every, 2, dtype=torch.float64, device=ranks.device)  # loss, gradient norm
        self.first_pending, self.count, self.watch_until = 0, 0, 0

    def observe(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Record a step's mean loss [] and gradient norm [], before its update. Raises Diverged.

        Synchronizes with the device once in `guard.every` steps.
        """
        if self.count == 0:
            self.first_pending = step
        self.pending[self.count, 0] = loss.detach()
        self.pending[self.count, 1] = norm
        self.count += 1
        if self.count == len(self.pending) or step < self.watch_until:
            self.check()

    def check(self) -> None:
        """Judge the steps recorded since the last check. Raises Diverged. A collective call; synchronizes."""
        if not self.count:
            return
        recorded, self.count = self.ranks.sum_(self.pending[:self.count].clone()).tolist(), 0
        for i, (loss, norm) in enumerate(recorded):
            loss /= self.ranks.size
            if not (math.isfinite(loss) and math.isfinite(norm)) or self._is_spike(loss):
                raise Diverged(self.first_pending + i)
            self.loss_ema = loss if self.good_losses == 0 else DECAY * self.loss_ema + (1 - DECAY) * loss
            self.good_losses += 1

    def rolled_back(self, watch_until: int) -> None:
        """Drop what was recorded; check every step before `watch_until` at once."""
        self.count, self.watch_until = 0, watch_until

    def state_dict(self) -> list[float]:
        return [self.loss_ema, self.good_losses]

    def load_state_dict(self, content: list[float]) -> None:
        self.loss_ema, self.good_losses = content[0], int(content[1])

    def _is_spike(self, loss: float) -> bool:
        spike = self.settings.spike
        return spike is not None and self.good_losses >= WARM_UP and loss > max(spike * self.loss_ema, self.guessing)


def gradient_norm(model: nn.Module) -> Tensor:
    """[]: the 2-norm of all gradients, on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


# ---- the layer that went wrong


@torch.no_grad()
def find_nonfinite(model: nn.Module, images: Tensor | None) -> str:
    """Describe the first layer or quantizer with a value that is not finite.

    Looks at parameters and buffers, then at the outputs for `images` [B, 3, H, W] (None leaves them out), then at
    gradients, each in the order of the network.
    """
    for name, module in model.named_modules():
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_floating_point() and not torch.isfinite(value).all():
                return f"{_describe(model, name)}: its {key} has {_count_nonfinite(value)}"
    output = None if images is None else _first_nonfinite_output(model, images)
    if output is not None:
        name, value = output
        return f"{_describe(model, name)}: its output has {_count_nonfinite(value)}"
    for name, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            if value.grad is not None and not torch.isfinite(value.grad).all():
                return f"{_describe(model, name)}: the gradient of its {key} has {_count_nonfinite(value.grad)}"
    return "no layer: parameters, outputs and gradients are finite, the loss jumped"


def _describe(model: nn.Module, name: str) -> str:
    """The quantizer that a module is, or is part of; else the layer."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        owner = ".".join(parts[:end])
        if isinstance(model.get_submodule(owner), Quantizer):
            return f"quantizer {owner}"
    return f"layer {name or type(model).__name__}"


def _first_nonfinite_output(model: nn.Module, images: Tensor) -> tuple[str, Tensor] | None:
    outputs: list[tuple[str, Tensor]] = []

    def watch(name: str):
        def hook(module, args, output):
            if not outputs and isinstance(output, Tensor) and not torch.isfinite(output).all():
                outputs.append((name, output))
        return hook

    # Hooks of children run before those of their parent, so the innermost module is found first.
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with in_evaluation(model):  # keeps running statistics as they are
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs[0] if outputs else None


def _count_nonfinite(value: Tensor) -> str:
    bad = value[~torch.isfinite(value)]
    return f"{len(bad)} of {value.numel()} values {'NaN' if bad.isnan().any() else 'infinite'}"
