"""Re-estimation of batch-norm statistics before a low-bit network is evaluated.

Weights of few bits jump between levels during training, most of all in depthwise layers. Running averages then mix the
statistics of many different networks. Nagel et al. (ICML 2022, arXiv:2203.11086) re-estimate them before every
evaluation, on 50 training batches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.quant.calibration.batches import images_of
from nulsq.quant.calibration.calibrate import average_batch_norm_
from nulsq.quant.modes import in_evaluation


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model that keep running statistics, in module order."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def freeze_batch_norm_(model: nn.Module) -> None:
    """Put every batch norm in evaluation mode until the next `model.train()`: running statistics are used and fixed."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@torch.no_grad()
def reestimate_batch_norm_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Set running means and variances to the plain average over the batches. In place; returns the model.

    The network runs in evaluation mode, quantized and without dropout, except that its batch norms use the statistics
    of each batch. Nothing else changes. In a process group every rank has to call this, with its own share of the
    images and the same number of batches. SyncBatchNorm uses the statistics of all ranks; those of other batch norms
    are averaged over the ranks.

    Args:
        batches: as `calibrate_` takes them.

    Raises:
        ValueError: there is no batch, or one without an image tensor.
    """
    norms = batch_norms(model)
    before = [(norm.momentum, _batches_tracked(norm).clone()) for norm in norms]
    count = 0
    try:
        with in_evaluation(model):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # plain average over the batches
            for x in images_of(batches, next(model.parameters()).device):
                model(x)
                count += 1
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            _batches_tracked(norm).copy_(tracked)
    if not count:
        raise ValueError("reestimate_batch_norm_: there is no batch")
    average_batch_norm_(norms)
    return model


def _batches_tracked(norm: _BatchNorm) -> Tensor:
    assert norm.num_batches_tracked is not None  # `batch_norms` returns only those with running statistics
    return norm.num_batches_tracked
