"""Batch-norm statistics measured anew on the network as it is: what evaluation of a low-bit network needs.

Running averages trail behind weights that jump between levels, most of all in depthwise layers: they describe no
network that ever was. Nagel et al. (ICML 2022, arXiv:2203.11086) measure them again before every evaluation, on 50
training batches.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.quant.calibration.calibrate import average_batch_norm_
from nulsq.quant.modes import in_evaluation


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model that keep running statistics, in module order."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def freeze_batch_norm_(model: nn.Module) -> None:
    """Put every batch norm in evaluation mode, until the next `model.train()`: its statistics stay, and are used."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@torch.no_grad()
def reestimate_batch_norm_(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set running means and variances to the plain average over the batches. In place; returns the model.

    The network runs as in evaluation, quantized and without dropout, but its batch norms take each batch's own
    statistics. Nothing else changes. In a process group every rank has to call this, with its own share of as many
    batches: statistics are those of all ranks where batch norms are SyncBatchNorm, else the average of the ranks'.

    Raises ValueError where there is no batch.
    """
    found = batch_norms(model)
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in found]
    count = 0
    try:
        with in_evaluation(model):
            for norm in found:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # plain average over what comes now
            for x in batches:
                model(x)
                count += 1
    finally:
        for norm, (momentum, tracked) in zip(found, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(tracked)
    if not count:
        raise ValueError("reestimate_batch_norm_: there is no batch")
    average_batch_norm_(found)
    return model
