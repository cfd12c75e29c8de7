"""What one step computes: the loss of a batch and its gradients.

    loss = (1 - w) CE(labels) + w T^2 KL(softmax(teacher / T) || softmax(student / T)) + dampening

CE is the cross entropy with label smoothing. w = `distill.weight`, T = `distill.temperature` where the recipe has a
teacher (Hinton, Vinyals and Dean 2015, arXiv:1503.02531; T^2 keeps the size of the gradients), else w = 0. The
dampening of oscillating weights is `nulsq.quant.oscillation`'s.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nulsq.config import Recipe
from nulsq.training.metrics import Counters


def backward(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, counters: Counters,
             teacher: nn.Module | None = None, dampening: Tensor | None = None) -> Tensor:
    """Forward and backward of this rank's part of a batch, in micro-batches; gradients are left in the parameters.

    `counters` get the loss of labels and teacher; `dampening` ([], of the weights alone) is added once a step.
    Returns the batch's loss, [].
    """
    parts, total = recipe.optim.accumulate, 0.0
    for i, (x, y) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
        last = i == parts - 1
        alone = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        with alone:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
                soft = None if teacher is None else _answer(teacher, x)
                logits = model(x)
            loss = task_loss(logits, y, recipe, soft)
            whole = loss / parts if dampening is None or not last else loss / parts + dampening
            whole.backward()
        counters.add(logits, y, loss)
        total = total + whole.detach()
    return total


def task_loss(logits: Tensor, labels: Tensor, recipe: Recipe, soft: Tensor | None = None) -> Tensor:
    """[]: the batch's mean for logits [B, classes], labels [B] and the teacher's logits, `soft`, if there is one."""
    hard_weight = 1.0 if soft is None else 1 - recipe.distill.weight
    loss = 0.0
    if hard_weight > 0:
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.optim.label_smoothing)
    if soft is None:
        return loss
    return hard_weight * loss + recipe.distill.weight * distillation(logits, soft, recipe.distill.temperature)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch, for logits [B, classes]."""
    found, wanted = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def _answer(teacher, x):
    return teacher(x)
