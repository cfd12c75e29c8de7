"""The state of a quantizer beyond its parameters: what data decided, what it was built as, and its data type.

Two buffers are part of every state dict:

    sign   what data decided: -1 not calibrated, 0 unsigned, 1 signed
    grid   what the quantizer was built as: [method, bits, lowest level, highest level]; the two levels are 0 before
           calibration. `method` is a checksum of the quantizer's name

`calibrated` and `signed` follow the buffer `sign`, however it is written: by `load_state_dict`, a broadcast, a moving
average or an in-place copy. Reading a device in every step would be slow, so the buffer is read again only when its
version counter or its identity has changed. Likewise the steps are projected to positive values before a forward pass
only if they were written since the last projection, for example by an optimizer that evaluates a closure.
"""

import zlib
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import Tensor, nn

from nulsq.quant.calibration.initial_step import SMALLEST_STEP
from nulsq.quant.op.reference import under_transform

Version = tuple[Tensor, int]  # a tensor and its version counter


class QuantizerState(nn.Module):
    """Base of `Quantizer`: `calibrated`, `signed`, positive steps, and checks of loaded state dicts."""

    sign: Tensor
    grid: Tensor

    def __init__(self, bits: int, role: str, signed: bool | None):
        super().__init__()
        self.bits, self.role = bits, role
        self.configured_sign = signed
        self.register_buffer("sign", torch.tensor(-1, dtype=torch.int8))
        self.register_buffer("grid", torch.tensor([_checksum(self.name()), bits, 0, 0], dtype=torch.int32))
        self._signed, self._calibrated = signed, False  # as of `_sign_read`
        self._sign_read: Version | None = None
        self._projected: list[Version] = []

    @classmethod
    def name(cls) -> str:
        """The name in recipes: the last part of the name of the Python module."""
        return cls.__module__.rpartition(".")[2]

    def level_range_of(self, signed: bool | None) -> tuple[int, int]:
        """Numbers of the lowest and of the highest level of the signed or of the unsigned grid, counted from zero."""
        raise NotImplementedError

    def positive_parameters(self) -> list[Tensor]:
        """The parameters that have to stay positive: steps and clipping thresholds. By default all parameters."""
        return list(self.parameters(recurse=False))

    def computed_buffers(self) -> dict[str, Tensor]:
        """Buffers that are no part of the state dict, with their values. Loading a state dict restores them."""
        return {}

    def register_computed_buffers(self) -> None:
        for name, value in self.computed_buffers().items():
            self.register_buffer(name, value, persistent=False)

    @property
    def calibrated(self) -> bool:
        """Whether sign and steps are set, by data or by a state dict."""
        self._read_sign()
        return self._calibrated

    @property
    def signed(self) -> bool | None:
        """Whether negative values have levels; None while data have not decided."""
        self._read_sign()
        return self._signed

    def set_sign_(self, signed: bool) -> None:
        """Set `signed` before the steps are computed; `mark_calibrated_` stores it."""
        self._read_sign()
        self._signed = signed

    @torch.no_grad()
    def mark_calibrated_(self) -> None:
        signed = bool(self._signed)
        self._calibrated = True
        self.sign.fill_(int(signed))
        self.grid.copy_(torch.tensor(self._built_as(signed), dtype=torch.int32))
        self._sign_read = _version_of(self.sign)

    def _read_sign(self) -> None:
        """Follow the buffer `sign` where it was written since it was read."""
        sign = self.sign
        # Fake tensors of a tracer and tensors on meta have no value: what was read before stays valid.
        if _is_traced() or type(sign) is not Tensor or sign.is_meta:
            return
        if _is_new(sign, self._sign_read) and not under_transform():  # the next call outside of a transform reads it
            signed = _sign_of(sign)
            self._calibrated = signed is not None
            self._signed = self.configured_sign if signed is None else signed
            self._sign_read = _version_of(sign)

    def prepare_(self) -> None:
        """Before a forward pass: raise RuntimeError without step sizes, project steps that were written since."""
        if not self.calibrated:
            raise RuntimeError(f"this {self.name()} {self.role} quantizer has no step sizes yet: "
                               "call nulsq.calibrate_(model, batches) or load a state dict first")
        if _is_traced() or under_transform():
            return
        # A tensor with a gradient function in the place of a parameter is the caller's (torch.func.functional_call).
        if any(parameter.grad_fn is None and not parameter.is_inference() and _is_new(parameter, projected)
               for parameter, projected in zip_longest(self.positive_parameters(), self._projected)):
            project_([self])

    def _built_as(self, signed: bool | None) -> list[int]:
        """The content of `grid` for a sign; None: not calibrated."""
        low, high = (0, 0) if signed is None else self.level_range_of(signed)
        return [_checksum(self.name()), self.bits, low, high]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        """As torch.nn.Module does; a state of another method, other bits or other levels is an error.

        torch calls this method for each module; its batch norms override it too. The public pre-hook cannot add the
        key that state dicts of earlier versions lack.
        """
        key = prefix + "grid"
        if prefix + "sign" in state_dict:
            # The range of levels depends on the sign; it is compared for the sign that is loaded.
            expected = self._built_as(_sign_of(state_dict[prefix + "sign"]))
            if key not in state_dict:  # saved before there was a grid
                state_dict[key] = torch.tensor(expected, dtype=torch.int32)
            loaded = [int(number) for number in state_dict[key].flatten()]
            if loaded != expected:
                error_msgs.append(f"{prefix.removesuffix('.')}: the state dict is that of {_described(loaded)}, the "
                                  f"model has {_described(expected)}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)
        self._read_sign()  # here and not in a compiled graph, which cannot
        if self.sign.is_meta:
            return
        for name, computed in self.computed_buffers().items():
            if getattr(self, name).is_meta:  # after load_state_dict(assign=True)
                setattr(self, name, computed.to(self.sign.device))
            else:  # after `to_empty`
                getattr(self, name).copy_(computed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch.nn.Module does for `to`, `half` and the like, but floating-point state stays float32.

        A step rounded to 16 bits moves every level. torch has no public way to exempt a module.
        """
        def keep_type(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if tensor.is_floating_point() and new.dtype != tensor.dtype else new

        return super()._apply(keep_type, recurse)


@torch.no_grad()
def project_(quantizers: list[Any]) -> None:
    """Clamp the positive parameters of all quantizers to at least SMALLEST_STEP, in one operation."""
    parameters = [quantizer.positive_parameters() for quantizer in quantizers]
    together = [parameter for own in parameters for parameter in own]
    if together:
        torch._foreach_clamp_min_(together, SMALLEST_STEP)
    for quantizer, own in zip(quantizers, parameters, strict=True):
        quantizer._projected = [_version_of(parameter) for parameter in own]


def _is_traced() -> bool:
    """Whether a compiler or TorchScript records operations: values of tensors must not be read or written."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _sign_of(sign: Tensor) -> bool | None:
    """The content of a buffer `sign`; None: not calibrated, or memory that was never written, which holds anything."""
    value = int(sign)
    return bool(value) if value in (0, 1) else None


def _is_new(tensor: Tensor, before: Version | None) -> bool:
    """Whether a tensor is another one than `before` or was written since. Inference tensors have no version: True."""
    return before is None or before[0] is not tensor or tensor.is_inference() or before[1] != tensor._version


def _version_of(tensor: Tensor) -> Version:
    return tensor, -1 if tensor.is_inference() else tensor._version


def _checksum(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def _described(grid: list[int]) -> str:
    """A `grid` in words."""
    from nulsq.quant.registry import available  # registry imports quantizers only by name

    if len(grid) != 4:
        return f"an unknown quantizer ({grid})"
    method, bits, low, high = grid
    name = next((name for name in available() if _checksum(name) == method), f"another method (checksum {method})")
    return f"{name} with {bits} bits" + (f" and levels {low} to {high}" if low != high else "")
