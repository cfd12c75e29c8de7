"""What one step computes: the loss of a batch and its gradients.

    loss = (1 - w) CE(labels) + w T^2 KL(softmax(teacher / T) || softmax(student / T)) + dampening

CE is the cross entropy with label smoothing. With a teacher, w = `distill.weight` and T = `distill.temperature`
(Hinton, Vinyals and Dean 2015, arXiv:1503.02531; T^2 keeps the size of the gradients); without one, w = 0. The
dampening of oscillating weights comes from `nulsq.quant.oscillation`.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nulsq.config import Recipe
from nulsq.tensor_format import autocast
from nulsq.training.metrics import Counters


@dataclass(frozen=True)
class TaskLoss:
    """The loss of labels and teacher: a batch's mean."""

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    weight: float = 1.0  # of the teacher's soft labels
    temperature: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, teacher: nn.Module | None = None) -> "TaskLoss":
        return cls(recipe.optim.label_smoothing, teacher, recipe.distill.weight, recipe.distill.temperature)

    @torch.no_grad()
    def soft_labels(self, images: Tensor) -> Tensor | None:
        """The teacher's logits [B, classes] for images [B, 3, H, W]; None without a teacher."""
        return None if self.teacher is None else self.teacher(images)

    def __call__(self, logits: Tensor, labels: Tensor, soft: Tensor | None = None) -> Tensor:
        """[]: the loss of logits [B, classes] for labels [B] and the teacher's logits, if there is one."""
        hard_weight = 1.0 if soft is None else 1 - self.weight
        loss = torch.zeros((), device=logits.device)
        if hard_weight > 0:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        if soft is None:
            return loss
        return hard_weight * loss + self.weight * distillation(logits, soft, self.temperature)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch, for logits [B, classes]."""
    own, target = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(own, target, reduction="batchmean", log_target=True)


def backward(model: nn.Module, images: Tensor, labels: Tensor, loss: TaskLoss, counters: Counters, *,
             accumulate: int = 1, precision: str = "fp32", dampening: Tensor | None = None) -> Tensor:
    """Forward and backward of this rank's part of a batch; gradients are left in the parameters.

    Args:
        images, labels: [B, 3, H, W] and [B].
        counters: get the loss of labels and teacher, and the hits.
        accumulate: micro-batches that the batch is computed in.
        precision: "fp32", or "bf16" for autocast.
        dampening: [], a loss of the weights alone, added once a step.

    Returns the batch's loss, [].
    """
    total = torch.zeros((), device=images.device)
    for i, (x, y) in enumerate(zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)):
        is_last = i == accumulate - 1
        # Ranks average their gradients once, in the last micro-batch.
        no_sync = contextlib.nullcontext if is_last else getattr(model, "no_sync", contextlib.nullcontext)
        with no_sync():
            with autocast(x.device, precision):
                soft = loss.soft_labels(x)
                logits = model(x)
            value = loss(logits, y, soft)
            part = value / accumulate if dampening is None or not is_last else value / accumulate + dampening
            part.backward()
        counters.add(logits, y, value)
        total = total + part.detach()
    return total
