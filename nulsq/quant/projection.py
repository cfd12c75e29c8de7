"""What has to happen to quantizers after every optimizer step: projection and running ranges."""

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from nulsq.quant.base import Quantizer, project_


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """All quantizers of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def follow_step_(optimizer: Optimizer, model: nn.Module):
    """After each `optimizer.step()`: keep step sizes positive, update running ranges. Returns the hook's handle.

    Call it once on the optimizer that steps last; `nulsq.training.optim` does so for you. The hook holds its own list
    of quantizers (`load_state_dict` overwrites flags in parameter groups). Copying or unpickling an optimizer drops
    hooks: attach again. In a process group every rank has to step: running ranges are reduced over the ranks, one
    collective for all of them.
    """
    found = quantizers_of(model)
    usual = [quantizer for quantizer in found if type(quantizer).after_step_ is Quantizer.after_step_]
    others = [quantizer for quantizer in found if type(quantizer).after_step_ is not Quantizer.after_step_]

    def after_step(*_):
        _share_maxima_(found)
        project_(usual)  # together: on a GPU the dozens of clampings cost a launch each
        for quantizer in others:
            quantizer.after_step_()

    return optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def _share_maxima_(found):
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    seen = [quantizer.seen for quantizer in found if getattr(quantizer, "range", None) == "running"]
    if not seen:
        return
    together = torch.cat([tensor.view(-1) for tensor in seen])
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    for tensor, reduced in zip(seen, together.split([tensor.numel() for tensor in seen]), strict=True):
        tensor.copy_(reduced.view(tensor.shape))
