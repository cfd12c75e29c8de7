"""The CPU kernel: cpu.cpp, called through ctypes.

If it cannot be compiled, `available()` is False, one warning gives the reason, and the forms in plain PyTorch are used.
"""

import ctypes
import functools
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nulsq.quant.op.cpu.build import compiled_library
from nulsq.quant.op.layout import dense, gradient_buffers, match_layout, prepare_layout
from nulsq.quant.op.reference import Affine, Rule, Table, compute_dtype

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
STE_RULES = ("clip", "none")  # `enum Ste` of rules.h
REDUCTIONS = ("none", "total", "per_gap", "per_cell")  # `enum Reduction`


class _Rule(ctypes.Structure):
    """`struct Rule` of rules.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("uniform", "ste", "reduction", "low", "high", "segments",
                                                  "thresholds", "relu")] + [("shift", ctypes.c_double)]


class _Call(ctypes.Structure):
    """`struct Call` of traversal.h."""

    _fields_ = ([("rule", _Rule)] + [(name, ctypes.c_int) for name in ("storage", "threads", "gap_count")]
                + [(name, ctypes.c_int64) for name in ("table_rows", "elements", "channels", "plane")]
                + [(name, ctypes.c_void_p) for name in (
                    "ties_up", "gaps", "levels", "thresholds", "mean", "scale", "bias", "rstd", "x", "grad_output",
                    "output", "grad_gaps", "grad_offset", "grad_slope", "grad_scale_sum", "grad_bias_sum",
                    "batch_mean", "batch_var")])


def available() -> bool:
    """Whether the kernel can be compiled here. The first call compiles it; a failure warns once."""
    return _library() is not None


def takes(rule: Rule) -> bool:
    """Whether the kernel has enough registers for this rule: always."""
    return True


def quantize(x: Tensor, table: Table, rule: Rule, affine: Affine | None = None) -> Tensor:
    """y: the level of each element, after `affine` if there is one; shape, type and memory order of x."""
    dtype = x.dtype
    x, table, call, affine = _prepare(x, table, rule, affine)
    y = torch.empty_like(x)
    call.output = y.data_ptr()
    _library().nulsq_run(call)
    return _to(y, dtype)


def gradients(x: Tensor, grad_output: Tensor, table: Table, rule: Rule,
              affine: Affine | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of x, gaps, offset and slope (None where the rule's reduction has none), and with an affine map also of
    its scale and bias."""
    x_dtype, sum_dtypes = x.dtype, [table.gaps.dtype] * 3
    if affine is not None:
        sum_dtypes += [affine.scale.dtype, affine.bias.dtype]
    x, table, call, affine = _prepare(x, table, rule, affine)
    grad = match_layout(grad_output, x)
    grad_input = torch.empty_like(x) if grad is grad_output else grad  # only our own copy is written over
    sums = gradient_buffers(table, rule)
    if affine is not None:
        sums += [torch.empty_like(affine.scale), torch.empty_like(affine.bias)]
    if grad.numel():
        call.grad_output, call.output = grad.data_ptr(), grad_input.data_ptr()
        addresses = [t if t is None else t.data_ptr() for t in sums]
        call.grad_gaps, call.grad_offset, call.grad_slope = addresses[:3]
        if affine is not None:
            call.grad_scale_sum, call.grad_bias_sum = addresses[3:]
        _library().nulsq_run(call)
    else:
        sums = [t if t is None else t.zero_() for t in sums]
    return _to(grad_input, x_dtype), *(t if t is None else _to(t, dtype)
                                       for t, dtype in zip(sums, sum_dtypes, strict=True))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel of x [N, C, ...]; float64 if x is, else float32."""
    x = dense(x)
    x = x if x.dtype in STORAGE else x.to(torch.float32)
    call = _call(x)
    mean, var = (torch.empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(2))
    call.channels, call.plane = x.shape[1], x.stride(1)
    call.batch_mean, call.batch_var = mean.data_ptr(), var.data_ptr()
    _library().nulsq_moments(call)
    return mean, var


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `Tensor.to`, which needs a microsecond to find that nothing is to do. A step has some hundred such calls."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _call(x: Tensor, table_rows: int = 1) -> _Call:
    return _Call(storage=STORAGE[x.dtype], threads=torch.get_num_threads(), table_rows=table_rows,
                 elements=x.numel() // table_rows, x=x.data_ptr())


def _prepare(x: Tensor, table: Table, rule: Rule,
             affine: Affine | None) -> tuple[Tensor, Table, _Call, Affine | None]:
    """The arguments in the kernel's layout. The caller keeps the tensors as long as the call, which has addresses."""
    x, table, rows = prepare_layout(x, table, (torch.bfloat16,))
    call = _call(x, rows)
    call.rule, call.ties_up = _switches(rule), ctypes.addressof(_ties(rule))
    call.gaps, call.gap_count = table.gaps.data_ptr(), table.gaps.shape[-1]
    if rule.index == "table":
        call.levels, call.thresholds = (t.data_ptr() for t in table.values())
    if affine is not None:
        assert rows == 1, "an affine map is along dimension 1 of x, the rows of a table are along dimension 0"
        dtype = compute_dtype(x)
        affine = affine.map(lambda t: _to(t, dtype).contiguous())
        call.channels, call.plane = x.shape[1], x.stride(1)
        call.mean, call.scale, call.bias = (t.data_ptr() for t in (affine.mean, affine.scale, affine.bias))
        if affine.rstd is not None:
            call.rstd = affine.rstd.data_ptr()
    return x, table, call, affine


@functools.cache
def _switches(rule: Rule) -> _Rule:
    return _Rule(rule.index == "uniform", STE_RULES.index(rule.ste), REDUCTIONS.index(rule.reduction),
                 *rule.level_range, rule.segments, len(rule.ties_up), rule.relu, rule.shift)


@functools.cache  # which also keeps the array alive: C++ gets its address
def _ties(rule: Rule) -> ctypes.Array:
    return (ctypes.c_uint8 * max(1, len(rule.ties_up)))(*rule.ties_up)


# ---- the library


@functools.cache
def _library() -> Any:  # ctypes.CDLL, or None where it cannot be compiled
    try:
        return load_library(compiled_library())
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn("no compiled quantizers on this machine, plain PyTorch serves (slower, same numbers): "
                      + " / ".join(detail[:3]), stacklevel=2)
        return None


def load_library(path: Path) -> ctypes.CDLL:
    """A compiled kernel with the types of its functions. Raises OSError if it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    for function in (library.nulsq_run, library.nulsq_moments):
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    return library
