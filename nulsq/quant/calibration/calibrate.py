"""calibrate_(model, batches): signs and initial step sizes from data.

Default protocol: the model runs in float, in evaluation mode, each layer's input is summed up into `Statistics`,
these are merged over batches and ranks, and every quantizer is reset from them. So all ranks end with the same
parameters, those of one process on the same images, and batch norm is as it was before.

Protocol "reference" is the authors': training mode, quantization on layer by layer, each layer's parameters set
from the batch that it sees (the larger of the batches' values is kept), batch-norm statistics moving. For parity.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.quant.base import Quantizer
from nulsq.quant.calibration.statistics import BatchStatistics, Statistics
from nulsq.quant.layers import QuantConv2d, QuantLinear
from nulsq.quant.modes import in_evaluation

PROTOCOLS = ("float", "reference")


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable, protocol: str = "float") -> nn.Module:
    """Settle the sign and the initial steps of every quantizer. In place; returns the model.

    Args:
        model: after `quantize_`. In a process group every rank has to call this, with its own share of the images.
        batches: image tensors as the model takes them, or tuples that start with one. May be empty where only
            weights are quantized.
        protocol: "float" or "reference", see above.

    Raises:
        ValueError: activations have to be calibrated and there is no batch, or one with NaN or infinite values.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"calibration protocol = {protocol!r}, allowed: {', '.join(PROTOCOLS)}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantConv2d | QuantLinear)}
    device = next(model.parameters()).device
    inputs = (_finite(_images(batch)).to(device) for batch in batches)
    with in_evaluation(model):
        if protocol == "reference":
            _layer_by_layer(model, layers, inputs)
        else:
            _in_float(model, layers, inputs, device)
    return model


def _in_float(model, layers, inputs, device):
    for layer in layers.values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.reset_(_statistics(Statistics, layer.weight_quantizer, layer.normalized_weight()[0]))
    needed = {name: layer for name, layer in layers.items() if layer.activation_quantizer is not None}
    if not needed:
        return
    found: dict[str, Statistics] = {}

    def observer(name, quantizer):
        def observe(x):
            new = _statistics(Statistics, quantizer, x)
            found[name] = found[name].merge(new) if name in found else new
        return observe

    try:
        for layer in layers.values():
            layer.observer = _ignore
        inputs = _settle_batch_norm(model, inputs, device)
        model.eval()
        for name, layer in needed.items():
            layer.observer = observer(name, layer.activation_quantizer)
        for x in inputs:
            model(x)
    finally:
        for layer in layers.values():
            layer.observer = None
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"calibrate_: no batch reached {', '.join(missing[:3])}; give at least one batch, and leave "
                         "layers whose weights the network uses without calling them float (a rule with quantizer: fp)")
    for name, layer in needed.items():
        statistics, quantizer = found[name].over_ranks(device), layer.activation_quantizer
        quantizer.reset_(statistics)
        if not quantizer.signed and statistics.low < 0:
            warnings.warn(f"the input of {name} goes down to {statistics.low:.3g} and its {quantizer.name()} quantizer "
                          "is unsigned: everything below zero becomes zero", stacklevel=3)


def _settle_batch_norm(model, inputs, device):
    """Batch norms that never saw data first get their statistics from the same batches, averaged over the ranks.

    A network fresh from its constructor has running statistics (0, 1) that describe no data; step sizes measured
    behind them would be wrong by the scale of each layer. Trained ones are left alone. (On several ranks the variance
    is that within each rank's share of a batch: all ranks agree, but not exactly with one process.)
    """
    # By value: a checkpoint without counters of batches has trained statistics all the same.
    fresh = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
             and not module.running_mean.any() and bool((module.running_var == 1).all())]
    if not fresh:
        return inputs
    inputs = list(inputs)
    model.eval()
    momenta = [module.momentum for module in fresh]
    try:
        for module in fresh:
            module.train()
            module.momentum = None  # plain average over the batches
        for x in inputs:
            model(x)
    finally:
        for module, momentum in zip(fresh, momenta, strict=True):
            module.momentum = momentum
    average_batch_norm_(fresh)
    return inputs


def average_batch_norm_(modules: Iterable[nn.Module]) -> None:
    """Average running statistics over the ranks (nothing outside a process group). A collective call."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    size = torch.distributed.get_world_size()
    for module in modules:
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            for running in (module.running_mean, module.running_var):
                torch.distributed.all_reduce(running)
                running /= size


def _layer_by_layer(model, layers, inputs):
    handles = [layer.register_forward_pre_hook(_keep_larger) for layer in layers.values()]
    try:
        model.train()
        for x in inputs:
            model(x)
    finally:
        for handle in handles:
            handle.remove()


def _keep_larger(layer, args):
    if layer.weight_quantizer is not None:
        keep_larger_(layer.weight_quantizer, _statistics(BatchStatistics, layer.weight_quantizer,
                                                         layer.normalized_weight()[0]))
    if layer.activation_quantizer is not None:
        keep_larger_(layer.activation_quantizer, _statistics(BatchStatistics, layer.activation_quantizer, args[0]))


def _statistics(kind, quantizer, x):
    return kind.of(x, per_channel=quantizer.channels is not None, histogram=quantizer.init == "lloyd_max")


def keep_larger_(quantizer: Quantizer, statistics: Statistics) -> None:
    """Reset from one batch; where parameters were set before, keep the larger of old and new, element by element."""
    def settled():
        return [*quantizer.parameters(), *(buffer for buffer in quantizer.buffers() if buffer.is_floating_point())]

    before = [value.clone() for value in settled()] if quantizer.calibrated else None
    if quantizer.calibrated and quantizer.signed:  # a sign that an earlier batch showed stays
        statistics.low = statistics.low.clamp(max=-torch.finfo(torch.float32).tiny)
    quantizer.reset_(statistics)
    if before is not None:
        for value, old in zip(settled(), before, strict=True):
            value.copy_(torch.maximum(value, old))


def _images(batch) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _finite(x):
    """Before the network sees it: batch norms that are not trained yet would keep what it holds."""
    if not torch.isfinite(x).all():
        raise ValueError(f"calibrate_: {int((~torch.isfinite(x)).sum())} of {x.numel()} values of a batch are NaN or "
                         "infinite")
    return x


def _ignore(x):
    pass
