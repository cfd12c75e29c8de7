"""The work of quantizers after every optimizer step: projection of the steps, and running ranges."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nulsq.quant.base import Quantizer
from nulsq.quant.state import project_
from nulsq.text import shortened


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """All quantizers of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def follow_step_(model: nn.Module | Optimizer, *optimizers: nn.Module | Optimizer) -> RemovableHandle:
    """Keep step sizes positive and update running ranges after each step of the optimizers. Returns the hook's handle.

    Call it once, with all optimizers of the model; the one that steps last comes last. The hook keeps a list of the
    model's quantizers. Copying or unpickling an optimizer drops its hooks: call this again. In a process group every
    rank has to step, since running ranges are reduced over the ranks, by one collective operation.

    The order (optimizer that steps last, model, other optimizers) works too.

    Raises:
        ValueError: the model has no quantizers, or none of the optimizers has one of its learned steps.
    """
    if isinstance(model, Optimizer) and optimizers and isinstance(optimizers[0], nn.Module):
        model, optimizers = optimizers[0], (*optimizers[1:], model)
    if not isinstance(model, nn.Module) or not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
        kinds = ", ".join(type(value).__name__ for value in (model, *optimizers))
        raise ValueError(f"follow_step_ takes a model and its optimizers, not ({kinds})")
    _require_learned(model, cast(tuple[Optimizer, ...], optimizers))
    quantizers = quantizers_of(model)
    usual = [quantizer for quantizer in quantizers if type(quantizer).after_step_ is Quantizer.after_step_]
    others = [quantizer for quantizer in quantizers if type(quantizer).after_step_ is not Quantizer.after_step_]

    def after_step(*_: Any) -> None:
        _reduce_maxima_(quantizers)
        project_(usual)  # all at once: on a GPU each clamp would cost a kernel launch
        for quantizer in others:
            quantizer.after_step_()

    return cast(Optimizer, optimizers[-1]).register_step_post_hook(after_step)


def _require_learned(model: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
    """Raise ValueError unless the optimizers have every parameter of a quantizer that requires a gradient."""
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    quantizers = [(name, module) for name, module in model.named_modules() if isinstance(module, Quantizer)]
    if not quantizers:
        raise ValueError("follow_step_: the model has no quantizers; call nulsq.quantize_ and nulsq.calibrate_ first")
    missing = [f"{name}.{key}" for name, quantizer in quantizers for key, p in quantizer.named_parameters(recurse=False)
               if p.requires_grad and id(p) not in owned]
    if missing:
        raise ValueError(f"follow_step_: no optimizer has {shortened(missing)}, so these steps would not "
                         "learn. Build the optimizers after quantize_, pass all of them to follow_step_, or set "
                         "learn_scale: false")


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
