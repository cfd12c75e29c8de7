"""calibrate_(model, batches): signs and initial step sizes from data.

Protocol "float", the default: the model runs in float and in evaluation mode. `Statistics` of each layer's input are
merged over batches and ranks, and every quantizer is reset from them. So all ranks get the parameters that one process
gets from the same images, and trained batch norms do not change.

Protocol "reference" is the authors', for parity: the model runs in training mode, layers are quantized one after the
other, each layer's parameters come from the batch that reaches it (the largest value over the batches is kept), and
batch-norm statistics are updated.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.quant.base import Quantizer
from nulsq.quant.calibration.statistics import BatchStatistics, Statistics
from nulsq.quant.layers import QuantConv2d, QuantLinear
from nulsq.quant.modes import in_evaluation

PROTOCOLS = ("float", "reference")
QuantLayers = dict[str, QuantConv2d | QuantLinear]  # by module name


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable, protocol: str = "float") -> nn.Module:
    """Set the sign and the initial steps of every quantizer. In place; returns the model.

    Args:
        model: after `quantize_`. In a process group every rank has to call this, with its own share of the images.
        batches: image tensors as the model takes them, or tuples that start with one. May be empty where only weights
            are quantized.
        protocol: "float" or "reference", see above.

    Raises:
        ValueError: activations are quantized and there is no batch, or a batch has NaN or infinite values.
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


def _in_float(model: nn.Module, layers: QuantLayers, inputs: Iterable[Tensor], device: torch.device) -> None:
    for layer in layers.values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.reset_(_statistics(Statistics, layer.weight_quantizer, layer.normalized_weight()[0]))
    quantizers = {name: layer.activation_quantizer for name, layer in layers.items()
                  if layer.activation_quantizer is not None}
    if not quantizers:
        return
    of_inputs: dict[str, Statistics] = {}

    def observer(name: str, quantizer: Quantizer) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            new = _statistics(Statistics, quantizer, x)
            of_inputs[name] = of_inputs[name].merge(new) if name in of_inputs else new
        return observe

    try:
        for layer in layers.values():
            layer.observer = _ignore
        inputs = _initialize_batch_norm(model, inputs)
        model.eval()
        for name, quantizer in quantizers.items():
            layers[name].observer = observer(name, quantizer)
        for x in inputs:
            model(x)
    finally:
        for layer in layers.values():
            layer.observer = None
    missing = [name for name in quantizers if name not in of_inputs]
    if missing:
        raise ValueError(f"calibrate_: no batch reached {', '.join(missing[:3])}; give at least one batch, and leave "
                         "layers whose weights the network uses without calling them float (a rule with quantizer: fp)")
    for name, quantizer in quantizers.items():
        statistics = of_inputs[name].over_ranks(device)
        quantizer.reset_(statistics)
        if not quantizer.signed and statistics.low < 0:
            warnings.warn(f"the input of {name} goes down to {statistics.low:.3g} and its {quantizer.name()} quantizer "
                          "is unsigned: everything below zero becomes zero", stacklevel=3)


def _initialize_batch_norm(model: nn.Module, inputs: Iterable[Tensor]) -> Iterable[Tensor]:
    """Set the statistics of untrained batch norms from the same batches, averaged over the ranks; returns the batches.

    In a new network the running statistics (0, 1) describe no data, so step sizes measured after these batch norms
    would be wrong by the scale of each layer. Trained batch norms do not change. On several ranks the variance is that
    within each rank's share of a batch: all ranks agree, but they differ slightly from one process.
    """
    # Compare values: the counter of batches is missing in some checkpoints.
    untrained = [module for module in model.modules() if isinstance(module, _BatchNorm) and _is_untrained(module)]
    if not untrained:
        return inputs
    inputs = list(inputs)
    model.eval()
    momenta = [module.momentum for module in untrained]
    try:
        for module in untrained:
            module.train()
            module.momentum = None  # plain average over the batches
        for x in inputs:
            model(x)
    finally:
        for module, momentum in zip(untrained, momenta, strict=True):
            module.momentum = momentum
    average_batch_norm_(untrained)
    return inputs


def _is_untrained(norm: _BatchNorm) -> bool:
    mean, var = norm.running_mean, norm.running_var
    return (norm.track_running_stats and mean is not None and var is not None and not mean.any()
            and bool((var == 1).all()))


def average_batch_norm_(modules: Iterable[nn.Module]) -> None:
    """Average running statistics over the ranks; does nothing outside a process group. A collective operation."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    size = torch.distributed.get_world_size()
    for module in modules:
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            for running in (module.running_mean, module.running_var):
                assert running is not None
                torch.distributed.all_reduce(running)
                running /= size


def _layer_by_layer(model: nn.Module, layers: QuantLayers, inputs: Iterable[Tensor]) -> None:
    handles = [layer.register_forward_pre_hook(_keep_larger) for layer in layers.values()]
    try:
        model.train()
        for x in inputs:
            model(x)
    finally:
        for handle in handles:
            handle.remove()


def _keep_larger(layer: Any, args: tuple[Tensor, ...]) -> None:
    if layer.weight_quantizer is not None:
        keep_larger_(layer.weight_quantizer, _statistics(BatchStatistics, layer.weight_quantizer,
                                                         layer.normalized_weight()[0]))
    if layer.activation_quantizer is not None:
        keep_larger_(layer.activation_quantizer, _statistics(BatchStatistics, layer.activation_quantizer, args[0]))


def _statistics(statistics: type[Statistics], quantizer: Quantizer, x: Tensor) -> Statistics:
    return statistics.of(x, per_channel=quantizer.channels is not None, histogram=quantizer.init == "lloyd_max")


def keep_larger_(quantizer: Quantizer, statistics: Statistics) -> None:
    """Reset from one batch; a calibrated quantizer keeps the larger of old and new values, element by element."""
    def values() -> list[Tensor]:
        return [*quantizer.parameters(), *(buffer for buffer in quantizer.buffers() if buffer.is_floating_point())]

    before = [value.clone() for value in values()] if quantizer.calibrated else None
    if quantizer.calibrated and quantizer.signed:  # an earlier batch had negative values: it stays signed
        statistics.low = statistics.low.clamp(max=-torch.finfo(torch.float32).tiny)
    quantizer.reset_(statistics)
    if before is not None:
        for value, old in zip(values(), before, strict=True):
            value.copy_(torch.maximum(value, old))


def _images(batch: Any) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


def _finite(x: Tensor) -> Tensor:
    """x itself, if it is finite. Checked before the network runs, since untrained batch norms would keep NaN."""
    if not torch.isfinite(x).all():
        raise ValueError(f"calibrate_: {int((~torch.isfinite(x)).sum())} of {x.numel()} values of a batch are NaN or "
                         "infinite")
    return x


def _ignore(x: Tensor) -> None:
    pass
