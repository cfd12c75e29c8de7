"""The product inside a layer whose forward is its own: a convolution or a linear operation.

Such a forward pads its input, transforms its weight or both, then calls `F.conv1d`, `F.conv2d` or `F.linear`. A
`TorchFunctionMode` sees that call with its operands. torch.compile and torch.export trace through the mode.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nulsq.quant.op import requantized

PRODUCTS = (F.conv1d, F.conv2d, F.linear)
Operands = tuple[Tensor, Tensor]  # input and weight


class Intercept(TorchFunctionMode):
    """Within the context, input and weight of each product are replaced by `change(input, weight)`."""

    def __init__(self, change: Callable[[Tensor, Tensor], Operands]):
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        call = functools.partial(self._product, func) if func in PRODUCTS else func
        return call(*args, **(kwargs or {}))

    def _product(self, func: Callable[..., Any], input: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        input, weight = self.change(input, weight)
        with requantized(input):
            return func(input, weight, *rest, **options)


def product_operands(layer: nn.Module, forward: Callable[..., Any]) -> Operands:
    """Input and weight of the product that `forward` calls, for an input of zeros of the smallest size.

    Raises ValueError if it calls none or several, and whatever the forward itself raises.
    """
    seen: list[Operands] = []

    def record(x: Tensor, weight: Tensor) -> Operands:
        seen.append((x, weight))
        return x, weight

    with Intercept(record):
        forward(_smallest_input(layer))
    if len(seen) != 1:
        raise ValueError(f"it calls {len(seen)}")
    return seen[0]


def _smallest_input(layer: Any) -> Tensor:
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return torch.zeros(1, layer.in_features, dtype=weight.dtype, device=weight.device)
    size = [dilation * (kernel - 1) + 1 for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.zeros(1, layer.in_channels, *size, dtype=weight.dtype, device=weight.device)
