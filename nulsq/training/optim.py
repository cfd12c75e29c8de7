"""Two optimizers, weights and quantizer parameters, and the learning rate as a pure function of the step.

Quantizer parameters are recognized by their owner (`isinstance(module, Quantizer)`), not by name. Their learning rate
is `coeff_qparm_lr` times that of the weights at every step; their weight decay is `qparm_wd`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nulsq.config import Optim
from nulsq.quant.projection import follow_step_, quantizers_of


@dataclass
class ParameterGroups:
    weights: list[nn.Parameter]
    norms_and_biases: list[nn.Parameter]  # one-dimensional ones
    quantizers: list[nn.Parameter]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Every parameter that requires a gradient, in exactly one group."""
    owned = {id(p): p for quantizer in quantizers_of(model) for p in quantizer.parameters() if p.requires_grad}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in owned]
    return ParameterGroups(weights=[p for p in others if p.dim() > 1],
                           norms_and_biases=[p for p in others if p.dim() <= 1],
                           quantizers=list(owned.values()))


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, warmup_lr: float,
                  shape: str = "cosine") -> float:
    """Learning rate of the weights at a step: linear from `warmup_lr` to `peak`, then half a cosine or a line to 0."""
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (1 - share if shape == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


class Optimizers:
    """The two optimizers of a run, stepped together."""

    def __init__(self, model: nn.Module, recipe: Optim):
        groups = parameter_groups(model)
        self.recipe = recipe
        self.clipped = groups.weights + groups.norms_and_biases
        decay = recipe.weight_decay
        split = [{"params": groups.weights, "weight_decay": decay},
                 {"params": groups.norms_and_biases, "weight_decay": decay if recipe.decay_norm_bias else 0.0}]
        self.weights = _build_optimizer(recipe.optimizer, [group for group in split if group["params"]], recipe)
        self.quantizers: Optimizer | None = None
        if groups.quantizers:
            own = [{"params": groups.quantizers, "weight_decay": recipe.qparm_wd}]
            self.quantizers = _build_optimizer(recipe.qparm_optimizer, own, recipe)
        if quantizers_of(model):
            follow_step_(model, *filter(None, (self.weights, self.quantizers)))

    def step(self, lr: float | Tensor) -> None:
        """Clip, set both learning rates, step both (weights first). A CUDA graph takes `lr` as a tensor [], so that
        each replay can have another one."""
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.clipped, self.recipe.clip_norm)
        in_graph = isinstance(lr, Tensor) and lr.is_cuda and torch.cuda.is_current_stream_capturing()
        for optimizer, rate in ((self.weights, lr), (self.quantizers, lr * self.recipe.coeff_qparm_lr)):
            if optimizer is None:
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate
                if "capturable" in group:  # fused optimizers always are; outside of a recording torch warns about it
                    group["capturable"] = in_graph
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in filter(None, (self.weights, self.quantizers)):
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"weights": _without_graph_state(self.weights.state_dict()),
                "quantizers": _without_graph_state(self.quantizers.state_dict()) if self.quantizers else None}

    def load_state_dict(self, state: dict) -> None:
        self.weights.load_state_dict(state["weights"])
        if self.quantizers:
            self.quantizers.load_state_dict(state["quantizers"])


def _without_graph_state(state: dict) -> dict:
    """An optimizer's state as a run without CUDA graphs has it: the learning rate a number, not capturable."""
    for group in state["param_groups"]:  # a copy
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return state


def _build_optimizer(name: str, groups: list[dict], recipe: Optim) -> Optimizer:
    # fused: one call for all parameters; a network has dozens of quantizers with a handful of steps each
    if name == "adamw":
        return AdamW(groups, lr=recipe.lr, fused=True)
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
