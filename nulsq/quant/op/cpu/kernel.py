"""The CPU form: cpu.cpp, compiled once on the machine where it runs, called through ctypes.

Compiling takes some seconds and happens once for a machine, a compiler and a version of the source: the library lies
in a folder of the user's cache (`$NULSQ_CACHE`, else `$XDG_CACHE_HOME/nulsq`, else `~/.cache/nulsq`). The compiler is
`$CXX`, else `c++`, `g++` or `clang++`. Where there is none, or it fails, `available()` is False, one warning says why,
and the forms in plain PyTorch serve.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from nulsq.quant.op.layout import dense, gradient_buffers, laid_like, laid_out
from nulsq.quant.op.reference import Affine, Rule, Table, computed_in

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cpp", "kinds.h", "lines.h", "table.h", "lanes.h")]
# Without -ffast-math: NaN has to stay NaN, and no sum may be taken apart. Where a loop lies is worth a tenth of a pass,
# and would change with every line of the source. The rest lets comparisons become masks.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno",
         "-falign-loops=64", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi", "-Wno-ignored-attributes",
         "-Wno-unknown-pragmas")
COMPILERS = ("c++", "g++", "clang++")
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
STE_RULES = ("clip", "none")
REDUCTIONS = ("none", "total", "per_gap", "per_cell")


class _Rule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("uniform", "ste", "reduction", "low", "high", "segments",
                                                  "thresholds", "relu")] + [("shift", ctypes.c_double)]


class _Call(ctypes.Structure):
    _fields_ = ([("rule", _Rule)] + [(name, ctypes.c_int) for name in ("storage", "threads", "gap_count")]
                + [(name, ctypes.c_int64) for name in ("channels", "elements", "features", "plane")]
                + [(name, ctypes.c_void_p) for name in ("ties_up", "gaps", "levels", "thresholds", "center", "scale",
                                                        "shift", "inverse", "x", "dy", "out", "dgaps",
                                                        "doffset", "dslope", "dscale", "dshift")])


def available() -> bool:
    """Whether the compiled form can be had here. The first call compiles; a failure warns once."""
    return _library() is not None


def takes(rule: Rule) -> bool:
    """Whether the kernel has room for this rule's thresholds and sums: always."""
    return True


def quantize(x: Tensor, table: Table, rule: Rule, affine: Affine | None = None) -> Tensor:
    """y: the level of each element, behind `affine` if there is one; shape, type and memory order of x."""
    stored = x.dtype
    x, table, call, affine = _prepare(x, table, rule, affine)
    y = torch.empty_like(x)
    call.out = y.data_ptr()
    _library().nulsq_run(call)
    return _in_type(y, stored)


def gradients(x: Tensor, dy: Tensor, table: Table, rule: Rule,
              affine: Affine | None = None) -> tuple[Tensor | None, ...]:
    """dx and the gradients of gaps, offset and slope, None where the rule's reduction has none; and, where there is an
    affine map, of its scale and shift.
    """
    stored, kinds = x.dtype, [table.gaps.dtype] * 3 + [each.dtype for each in (affine or ())[1:3]]
    x, table, call, affine = _prepare(x, table, rule, affine)
    given, dy = dy, laid_like(dy, x)
    dx = torch.empty_like(x) if dy is given else dy  # a copy of ours may be written over
    sums = gradient_buffers(table, rule) + [torch.empty_like(each) for each in (affine or ())[1:3]]
    if dy.numel():
        call.dy, call.out = dy.data_ptr(), dx.data_ptr()
        call.dgaps, call.doffset, call.dslope = (each if each is None else each.data_ptr() for each in sums[:3])
        if affine is not None:
            call.dscale, call.dshift = (each.data_ptr() for each in sums[3:])
        _library().nulsq_run(call)
    else:
        sums = [each if each is None else each.zero_() for each in sums]
    return _in_type(dx, stored), *map(_in_type, sums, kinds)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel of x [N, C, ...]; float32, of a double in its type."""
    x = dense(x)
    x = x if x.dtype in STORAGE else x.to(torch.float32)
    call = _call(x)
    kind = computed_in(x)
    mean, var = (torch.empty(x.shape[1], dtype=kind) for _ in range(2))
    call.features, call.plane = x.shape[1], x.stride(1)
    call.dscale, call.dshift = mean.data_ptr(), var.data_ptr()
    _library().nulsq_moments(call)
    return mean, var


def _in_type(tensor, kind):
    """As `to`, which takes a microsecond to find that there is nothing to do; some hundred of them are in a step."""
    return tensor if tensor is None or tensor.dtype == kind else tensor.to(kind)


def _call(x, channels=1):
    return _Call(storage=STORAGE[x.dtype], threads=torch.get_num_threads(), channels=channels,
                 elements=x.numel() // channels, x=x.data_ptr())


def _prepare(x, table, rule, affine):
    x, table, channels = laid_out(x, table, (torch.bfloat16,))
    call = _call(x, channels)
    call.rule, call.ties_up = _switches(rule), ctypes.addressof(_ties(rule))
    call.gaps, call.gap_count = table.gaps.data_ptr(), table.gaps.shape[-1]
    if rule.index == "table":
        call.levels, call.thresholds = table.levels.data_ptr(), table.thresholds.data_ptr()
    if affine is not None:
        assert channels == 1, "an affine map is along dimension 1 of x, a table of several channels along dimension 0"
        affine = _lines(call, x, affine)
    return x, table, call, affine


def _lines(call, x, affine):
    """Tell the call what lies where; returns the tensors, which have to live as long as it."""
    kind = computed_in(x)
    affine = Affine(*(each if each is None else _in_type(each, kind).contiguous() for each in affine))
    call.features, call.plane = x.shape[1], x.stride(1)
    call.center, call.scale, call.shift = (each.data_ptr() for each in affine[:3])
    if affine.inverse is not None:
        call.inverse = affine.inverse.data_ptr()
    return affine


@functools.cache
def _switches(rule):
    return _Rule(rule.index == "uniform", STE_RULES.index(rule.ste), REDUCTIONS.index(rule.reduction),
                 *rule.level_range, rule.segments, len(rule.ties_up), rule.relu, rule.shift)


@functools.cache  # which also keeps the array alive: C++ gets its address
def _ties(rule):
    return (ctypes.c_uint8 * max(1, len(rule.ties_up)))(*rule.ties_up)


# ---- the library


@functools.cache
def _library():
    try:
        return loaded(_compiled())
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn("no compiled quantizers on this machine, plain PyTorch serves (slower, same numbers): "
                      + " / ".join(detail[:3]), stacklevel=2)
        return None


def loaded(path: Path) -> ctypes.CDLL:
    """A compiled kernel, ready to be called. Raises OSError where it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    for function in (library.nulsq_run, library.nulsq_moments):
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    return library


def _compiled() -> Path:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler ({', '.join(COMPILERS)}, or $CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = [*(source.read_text() for source in SOURCES), *FLAGS, compiler, version, _processor()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    path = cache_folder() / f"quantizers-{key[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # aside, then renamed: others may compile too
            made = Path(folder) / path.name
            subprocess.run([compiler, *FLAGS, str(SOURCES[0]), "-o", str(made)], capture_output=True, text=True,
                           check=True, timeout=300)
            made.replace(path)
    return path


def cache_folder() -> Path:
    """Where compiled code is kept between processes."""
    if own := os.environ.get("NULSQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nulsq"


def _processor():
    """What -march=native depends on: a cache folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()
