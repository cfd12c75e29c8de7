"""The divergence guard: notices that a run goes wrong, and says where.

A step goes wrong when the loss or the norm of the gradients is no number, or when the loss jumps to `guard.spike`
times the mean of the good ones before it and above that of guessing. Both numbers stay on the device; the host looks
at them once in `guard.every` steps, before every checkpoint (so none holds a network gone bad), and at each step
after a roll-back. The mean of the good losses, an exponential one, follows from the losses alone, whenever they are
looked at: an interrupted run decides as the uninterrupted one does.
"""

import math

import torch
from torch import Tensor, nn

from nulsq.config.recipe import Guard
from nulsq.distributed import Ranks
from nulsq.quant.base import Quantizer
from nulsq.quant.modes import in_evaluation

DECAY = 0.95  # of the mean of good losses, a step
TRUSTED = 20  # good losses before a jump counts as one


class DivergenceGuard:
    """Looks after the steps of one run. All ranks make the same calls and get the same answers.

    `level` is the mean of the good losses and their number; it belongs to the run's state.
    """

    def __init__(self, settings: Guard, classes: int, ranks: Ranks):
        self.settings, self.ranks = settings, ranks
        self.guessing = math.log(classes)
        self.numbers = torch.zeros(settings.every, 2, dtype=torch.float64, device=ranks.device)  # loss, norm
        self.first, self.count, self.watched = 0, 0, 0

    def look(self, step: int, loss: Tensor, norm: Tensor, level: list[float]) -> int | None:
        """Take down a step's mean loss [] and gradient norm [], before its update. The first bad step known, or None.

        No synchronization but once in `every` steps.
        """
        if self.count == 0:
            self.first = step
        self.numbers[self.count, 0] = loss.detach()
        self.numbers[self.count, 1] = norm
        self.count += 1
        full = self.count == len(self.numbers)
        return self.check(level) if full or step < self.watched else None

    def check(self, level: list[float]) -> int | None:
        """Judge what was taken down since the last time. A collective call; synchronizes."""
        if not self.count:
            return None
        taken, self.count = self.ranks.sum_(self.numbers[:self.count].clone()).tolist(), 0
        for i, (loss, norm) in enumerate(taken):
            loss /= self.ranks.size
            if not (math.isfinite(loss) and math.isfinite(norm)) or self._jumps(loss, level):
                return self.first + i
            level[0] = loss if level[1] == 0 else DECAY * level[0] + (1 - DECAY) * loss
            level[1] += 1
        return None

    def forget(self, watched: int) -> None:
        """The run goes back: what was taken down is void, and steps before `watched` are looked at one by one."""
        self.count, self.watched = 0, watched

    def _jumps(self, loss, level):
        spike = self.settings.spike
        return spike is not None and level[1] >= TRUSTED and loss > max(spike * level[0], self.guessing)


def gradient_norm(model: nn.Module) -> Tensor:
    """[]: the 2-norm of all gradients, on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def first_bad(model: nn.Module, images: Tensor) -> str:
    """Which layer or quantizer's values went bad, in words: parameters first, then outputs for [B, 3, H, W] images,
    then gradients, each in the order of the network."""
    for name, module in model.named_modules():
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.is_floating_point() and not torch.isfinite(value).all():
                return f"{_named(model, name)}: its {key} has {_kind(value)}"
    found = _first_bad_output(model, images)
    if found is not None:
        name, value = found
        return f"{_named(model, name)}: its output has {_kind(value)}"
    for name, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            if value.grad is not None and not torch.isfinite(value.grad).all():
                return f"{_named(model, name)}: the gradient of its {key} has {_kind(value.grad)}"
    return "no layer: parameters, outputs and gradients are finite, the loss jumped"


def _named(model, name):
    """The quantizer that a module is or is part of, else the layer, in words."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        owner = ".".join(parts[:end])
        if isinstance(model.get_submodule(owner), Quantizer):
            return f"quantizer {owner}"
    return f"layer {name or type(model).__name__}"


def _first_bad_output(model, images):
    found = []

    def watch(name):
        def hook(module, args, output):
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append((name, output))
        return hook

    # A module ends after its children, so the innermost one is met first.
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with in_evaluation(model):  # running statistics stay as they are
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _kind(value):
    bad = value[~torch.isfinite(value)]
    return f"{len(bad)} of {value.numel()} values {'NaN' if bad.isnan().any() else 'infinite'}"
