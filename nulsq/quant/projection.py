"""The work of quantizers after every optimizer step: projection of the steps, and running ranges."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nulsq.quant.base import Quantizer, project_


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """All quantizers of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def follow_step_(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Keep step sizes positive and update running ranges after each `optimizer.step()`. Returns the hook's handle.

    Call it once, on the optimizer that steps last; `nulsq.training.optim` does so for the trainer. The hook keeps a
    list of the model's quantizers. Copying or unpickling an optimizer drops its hooks: call this again. In a process
    group every rank has to step, since running ranges are reduced over the ranks, by one collective operation.
    """
    quantizers = quantizers_of(model)
    usual = [quantizer for quantizer in quantizers if type(quantizer).after_step_ is Quantizer.after_step_]
    others = [quantizer for quantizer in quantizers if type(quantizer).after_step_ is not Quantizer.after_step_]

    def after_step(*_: Any) -> None:
        _reduce_maxima_(quantizers)
        project_(usual)  # all at once: on a GPU each clamp would cost a kernel launch
        for quantizer in others:
            quantizer.after_step_()

    return optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def _reduce_maxima_(quantizers: list[Quantizer]) -> None:
    """Reduce the batches' maxima of quantizers with a running range over the ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    maxima: list[Tensor] = [quantizer.seen for quantizer in quantizers  # type: ignore[misc]
                            if getattr(quantizer, "range", None) == "running"]
    if not maxima:
        return
    together = torch.cat([tensor.view(-1) for tensor in maxima])
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    for tensor, reduced in zip(maxima, together.split([tensor.numel() for tensor in maxima]), strict=True):
        tensor.copy_(reduced.view(tensor.shape))
