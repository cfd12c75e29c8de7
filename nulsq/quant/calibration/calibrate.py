"""calibrate_(model, batches): signs and initial step sizes from data.

Protocol "float", the default: the model runs in float and in evaluation mode. `Statistics` of each layer's input are
merged over batches and ranks, and every quantizer is reset from them. So all ranks get the parameters that one process
gets from the same images, and trained batch norms do not change.

Protocol "reference" is the authors', for parity: the model runs in training mode, layers are quantized one after the
other, each layer's parameters come from the batch that reaches it (the largest value over the batches is kept), and
batch-norm statistics are updated.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nulsq.quant.attention import OPERANDS, QuantizedAttention
from nulsq.quant.base import Quantizer
from nulsq.quant.calibration.batches import images_of
from nulsq.quant.calibration.statistics import BatchStatistics, Statistics
from nulsq.quant.layers import QuantizedLayer
from nulsq.quant.modes import in_evaluation
from nulsq.quant.multiply_adds import count, quantized_share
from nulsq.text import shortened

PROTOCOLS = ("float", "reference")
LITTLE = 0.9  # of the multiply-adds: a warning if fewer are quantized
Observer = Callable[..., bool]  # of a layer or an attention
# Quantized layers and attentions with quantized products, by module name. Both have an observer.
Modules = dict[str, QuantizedLayer | QuantizedAttention]


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable, protocol: str = "float") -> nn.Module:
    """Set the sign and the initial steps of every quantizer. In place; returns the model.

    Args:
        model: after `quantize_`. In a process group every rank has to call this, with its own share of the images.
        batches: image tensors as the model takes them, (images, labels), mappings with `image` or `pixel_values`; a
            list of these, a DataLoader. May be empty where only weights are quantized.
        protocol: "float" or "reference", see above.

    Raises:
        ValueError: activations are quantized and there is no batch, a batch has NaN or infinite values, or a quantized
            layer is never called, although there is a batch.

    Warns if less than 90 % of the multiply-adds are quantized afterwards.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"calibration protocol = {protocol!r}, allowed: {', '.join(PROTOCOLS)}")
    modules: Modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)
                        or isinstance(module, QuantizedAttention) and module.has_quantized_products()}
    device = next(model.parameters()).device
    first: list[Tensor] = []

    def inputs() -> Iterator[Tensor]:
        for x in map(_finite, images_of(batches, device)):
            if not first and len(x):
                first.append(x[:1])
            yield x

    with in_evaluation(model):
        if protocol == "reference":
            _layer_by_layer(model, modules, inputs())
        else:
            _in_float(model, modules, inputs(), device)
    if first and modules:
        _measure_share(model, first[0])
    return model


def _measure_share(model: Any, image: Tensor) -> None:
    """Note how much of the multiply-adds is quantized, for `summary`; warn if it is little."""
    share = quantized_share(model, count(model, image))
    model.quantized_share = share
    if share.share < LITTLE:
        warnings.warn(f"{share}. nulsq.summary(model) says what stays float", stacklevel=4)


def _in_float(model: nn.Module, modules: Modules, inputs: Iterable[Tensor], device: torch.device) -> None:
    inputs_of = {f"{name}.{operand}": quantizer for name, module in modules.items()
                 for operand, quantizer in quantizers_by_operand(module).items() if operand != "weight"}
    of_inputs: dict[str, Statistics] = {}
    reached: set[str] = set()
    only_in_training: set[str] = set()  # auxiliary heads

    def observer(name: str) -> Observer:
        def observe(**operands: Tensor) -> bool:
            reached.add(name)
            for operand, x in operands.items():
                key = f"{name}.{operand}"
                if key in inputs_of and x.numel():  # the last batch of a loader may be empty
                    new = _statistics(Statistics, inputs_of[key], x)
                    of_inputs[key] = of_inputs[key].merge(new) if key in of_inputs else new
            return False
        return observe

    batches = 0
    try:
        for module in modules.values():
            module.observer = _pass_on
        inputs = _initialize_batch_norm(model, inputs)
        model.eval()
        observers = {name: observer(name) for name in modules}
        for name, module in modules.items():
            module.observer = observers[name]
        for x in inputs:
            model(x)
            if not batches:
                only_in_training = modules.keys() - reached
            batches += 1
            if only_in_training:
                _run_in_training(model, x, modules, observers, only_in_training)
    finally:
        for module in modules.values():
            module.observer = None
    if batches:
        _require_reached(modules, reached)
    missing = next((key for key in inputs_of if key not in of_inputs), None)
    if missing is not None:
        raise ValueError(f"calibrate_: no value reached {_described(missing)}: activations are quantized, give at "
                         "least one batch with images")
    # Nothing was set so far: an error above leaves the quantizers as they were. Layers that share a weight share its
    # quantizer: once for each.
    layers = [module for module in modules.values() if isinstance(module, QuantizedLayer)]
    for of_weight, layer in {layer.weight_quantizer: layer for layer in layers}.items():
        if of_weight is not None:
            of_weight.reset_(_statistics(Statistics, of_weight, layer.normalized_weight()[0]))
    for key, quantizer in inputs_of.items():
        statistics = of_inputs[key].over_ranks(device)
        quantizer.reset_(statistics)
        if not quantizer.signed and statistics.low < 0:
            warnings.warn(f"the input of {_described(key)} goes down to {statistics.low:.3g} and its "
                          f"{quantizer.name()} quantizer is unsigned: everything below zero becomes zero", stacklevel=4)


def quantizers_by_operand(module: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a layer ("activation", "weight") or of an attention ("query", ...)."""
    return {operand: quantizer for operand in ("activation", "weight", *OPERANDS)
            if (quantizer := getattr(module, f"{operand}_quantizer", None)) is not None}


def _described(key: str) -> str:
    return key.removesuffix(".activation")


def _run_in_training(model: nn.Module, x: Tensor, modules: Modules, observers: dict[str, Observer],
                     names: Iterable[str]) -> None:
    """One pass in training mode that is observed by these modules alone, such as auxiliary heads.

    Batch-norm statistics and random numbers are as before afterwards.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        for name, module in modules.items():
            module.observer = observers[name] if name in names else _pass_on
        with torch.random.fork_rng(devices):
            model.train()
            model(x)
    except Exception as error:  # whatever the network's own code raises
        raise ValueError(f"calibrate_: {shortened(sorted(names))} are not called in evaluation mode, and the model "
                         f"fails in training mode: {error}") from error
    finally:
        model.eval()
        for buffer, value in before:
            buffer.copy_(value)
        for name, module in modules.items():
            module.observer = observers[name]


def _require_reached(modules: Modules, reached: set[str]) -> None:
    missing = [name for name in modules if name not in reached]
    if missing:
        raise ValueError(f"calibrate_: the network never calls {shortened(missing)}. If it uses their weights without "
                         "calling the layers, leave them float: a rule with quantizer: fp")


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


def _layer_by_layer(model: nn.Module, modules: Modules, inputs: Iterable[Tensor]) -> None:
    reached: set[str] = set()
    batches = 0

    def observer(name: str, module: QuantizedLayer | QuantizedAttention) -> Observer:
        quantizers = quantizers_by_operand(module)

        def observe(**operands: Tensor) -> bool:
            reached.add(name)
            for operand, x in operands.items():
                if operand not in quantizers or not x.numel():
                    continue
                if operand == "weight" and isinstance(module, QuantizedLayer):
                    x = module.normalized_weight(x)[0]
                keep_larger_(quantizers[operand], _statistics(BatchStatistics, quantizers[operand], x))
            return True
        return observe

    try:
        for name, module in modules.items():
            module.observer = observer(name, module)
        model.train()
        for x in inputs:
            model(x)
            batches += 1
    finally:
        for module in modules.values():
            module.observer = None
    if batches:
        _require_reached(modules, reached)


def _statistics(statistics: type[Statistics], quantizer: Quantizer, x: Tensor) -> Statistics:
    histogram = quantizer.has_steps and (quantizer.init or statistics.default_init) == "mse"
    return statistics.of(x, per_channel=quantizer.channels is not None, histogram=histogram)


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


def _finite(x: Tensor) -> Tensor:
    """x itself, if it is finite. Checked before the network runs, since untrained batch norms would keep NaN."""
    if not torch.isfinite(x).all():
        raise ValueError(f"calibrate_: {int((~torch.isfinite(x)).sum())} of {x.numel()} values of a batch are NaN or "
                         "infinite")
    return x


def _pass_on(**operands: Tensor) -> bool:
    """The observer of a module that computes in float and measures nothing."""
    return False
