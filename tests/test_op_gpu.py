"""The GPU kernels: equal to the reference form in Triton's interpreter or on a GPU; compiled for sm_90 without one."""

import copy
import functools
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from bench import instructions
from nulsq.quant.fold import fold_
from nulsq.quant.op import force, kernels, reference
from nulsq.quant.op.gpu import kernel as gpu
from nulsq.quant.op.reference import Affine, Table
from tests import test_fold, test_op_fused
from tests.float64 import to_float64

ready = functools.partial(test_op_fused.ready, rows=1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICE = "cpu" if INTERPRETED else "cuda"
kernel = (lambda test: test) if INTERPRETED else pytest.mark.gpu


@pytest.mark.slow
def test_in_tritons_interpreter():
    """The tests marked `kernel` in a process that interprets Triton, which reads that setting when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "kernel", __file__], capture_output=True,
                          text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40


def assert_equal_to_reference(quantizer, x, dy):
    table = Table(*(None if t is None else t.detach() for t in quantizer.table()))
    rule = quantizer.rule()
    expected = reference.quantize(x, table, rule)[0].to(x.dtype)
    actual = gpu.quantize(x, table, rule)
    assert actual.dtype == x.dtype and actual.stride() == x.stride()
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter cuts what a GPU rounds to nearest
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(actual, expected)
    expected, actual = reference.gradients(x, dy, table, rule), gpu.gradients(x, dy, table, rule)
    assert torch.equal(actual[0], expected[0]) and actual[0].stride() == x.stride()
    for a, b in zip(actual[1:], expected[1:], strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def tensors(*shape, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).to(DEVICE, dtype) for _ in range(2)]


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["lsq", "nulsq", "apot", "lcq", "uniq"])
def test_kernel_of_every_method_width_and_type(name, bits, dtype):
    quantizer = ready(name, bits).to(DEVICE)
    quantizer = to_float64(quantizer) if dtype == torch.float64 else quantizer
    assert_equal_to_reference(quantizer, *tensors(5, 7, 11, dtype=dtype))


@kernel
@pytest.mark.parametrize("bits", [1, 8])
def test_kernel_of_the_narrowest_and_the_widest(bits):
    for name in ("minmax", "nulsq"):
        signed = bits > 1
        assert_equal_to_reference(ready(name, bits, signed=signed).to(DEVICE), *tensors(5, 7))


@kernel
@pytest.mark.parametrize("ste", ["clip", "none"])
def test_kernel_at_thresholds_and_ends(ste):
    for name in ("lsq", "nulsq"):
        quantizer = ready(name, 2, signed=True, ste=ste)
        marks = torch.cat([quantizer.levels(), quantizer.thresholds()])
        x = torch.cat([marks, torch.nextafter(marks, marks + 1), torch.nextafter(marks, marks - 1),
                       torch.tensor([0.0, -0.0, torch.inf, -torch.inf])]).to(DEVICE)
        assert_equal_to_reference(quantizer.to(DEVICE), x, torch.ones_like(x))
        table, rule = quantizer.table(), quantizer.rule()
        assert gpu.quantize(torch.tensor([torch.nan], device=DEVICE), table, rule).isnan().all()


@kernel
@pytest.mark.parametrize("name", ["lsq", "nulsq", "lcq"])
def test_kernel_with_a_table_for_each_channel(name):
    quantizer = ready(name, 3, "weight", channels=6).to(DEVICE)
    x, dy = tensors(6, 5, 3, 3)
    assert_equal_to_reference(quantizer, x, dy)
    assert_equal_to_reference(quantizer, *(t.contiguous(memory_format=torch.channels_last) for t in (x, dy)))


@kernel
@pytest.mark.parametrize(("x_type", "table_type"), [(torch.bfloat16, torch.float64), (torch.float32, torch.float64),
                                                    (torch.float64, torch.float32)])
def test_kernel_with_a_table_of_another_type(x_type, table_type):
    for name in ("lsq", "nulsq", "lcq"):
        assert_equal_to_reference(ready(name, 3).to(DEVICE, table_type), *tensors(5, 7, 11, dtype=x_type))


@kernel
@pytest.mark.parametrize("name", ["lsq", "nulsq", "lcq"])
def test_kernel_with_the_relu_before_it(name):
    for signed in (False, True):
        quantizer = ready(name, 3, signed=signed).to(DEVICE)
        quantizer.does_relu = lambda: True
        x, dy = tensors(5, 7, 11)
        x[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-30, -torch.inf])
        assert_equal_to_reference(quantizer, x, dy)


@kernel
def test_kernel_over_several_blocks_of_a_program_and_empty_tensors():
    assert_equal_to_reference(ready("nulsq", 2).to(DEVICE), *tensors(23, 1000))
    assert_equal_to_reference(ready("nulsq", 2).to(DEVICE), *tensors(0, 4))


def test_the_grid_is_long_in_its_first_dimension_only():
    """CUDA's other dimensions are limited to 65,535."""
    for shape in ((100_000, 3), (3, 10_000_000)):
        groups, programs = gpu.tiles(torch.empty(shape, device="meta"), shape[0], None, 1024).grid(torch.device("cpu"))
        assert groups == shape[0] and 1 <= programs < 65_536


def test_tiles_across_channels_leave_little_empty():
    actual = {}
    for channels in (16, 24, 64, 96, 130, 192, 512):
        x = torch.empty(2, channels, 5, 7, device="meta").contiguous(memory_format=torch.channels_last)
        walk = gpu.tiles(x, 1, Affine(*[torch.empty(channels)] * 3), 512)
        actual[channels] = walk.groups, walk.constants["COLS"]
    assert actual == {16: (1, 16), 24: (1, 32), 64: (1, 64), 96: (3, 32), 130: (5, 32), 192: (3, 64),
                     512: (4, 128)}


# ---- after a batch norm


def assert_after_norm_equal_to_reference(quantizer, x, dy, affine, tolerance):
    """The kernels against autograd through the map in plain PyTorch; levels bit for bit."""
    table, rule = Table(*(None if t is None else t.detach() for t in quantizer.table())), quantizer.rule()
    leaves = [x.detach().requires_grad_(), *(each.requires_grad_() for each in affine[1:3])]
    mapped = affine._replace(scale=leaves[1], bias=leaves[2]).of(leaves[0])
    expected_y = reference.quantize(mapped, table, rule)[0].to(x.dtype)
    dmapped, *sums = reference.gradients(mapped.detach(), dy, table, rule)
    dx, dscale, dshift = torch.autograd.grad(mapped, leaves, dmapped)
    expected = [dx, *sums, dscale, dshift]

    affine = Affine(*(each if each is None else each.detach() for each in affine))
    y = gpu.quantize(x, table, rule, affine)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert torch.equal(y, expected_y) or INTERPRETED and x.dtype == torch.bfloat16
    actual = gpu.gradients(x, dy, table, rule, affine)
    assert actual[0].dtype == x.dtype and actual[0].stride() == x.stride()
    for a, b in zip(actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def affine_of(x, own):
    """A batch norm for x, with the statistics of the batch or others."""
    kind, draw = torch.promote_types(x.dtype, torch.float32), torch.Generator().manual_seed(2)
    weight, bias, mean = (torch.randn(x.shape[1], generator=draw).to(DEVICE, kind) for _ in range(3))
    if not own:
        return Affine(mean, weight, bias)
    var, mean = torch.var_mean(x.to(kind), (0, 2, 3), correction=0)
    rstd = (var + 1e-5).rsqrt()
    return Affine(mean, weight * rstd, bias, rstd)


# a row of channels in one tile and in several lanes; planes in one tile and in several; several tiles of a program
ALL = [(4, 3, 5, 7), (2, 16, 9, 9), (5, 1, 8, 8), (9, 33, 1, 1), (3, 2, 40, 41)]


@kernel
@pytest.mark.parametrize(("shape", "memory"), [(shape, torch.contiguous_format) for shape in ALL]
                         + [(shape, torch.channels_last) for shape in [*ALL, (3, 130, 3, 2)]], ids=str)
def test_kernel_after_a_batch_norm_on_every_shape(shape, memory):
    x, dy = (t.contiguous(memory_format=memory) for t in tensors(*shape))
    several = shape == ALL[-1]
    for name, cases in {"nulsq": [False, True], "lsq": [True], "lcq": [] if several else [True]}.items():
        quantizer = ready(name, 3, signed=False).to(DEVICE)
        quantizer.does_relu = lambda: True
        for own in cases:
            assert_after_norm_equal_to_reference(quantizer, x, dy, affine_of(x, own), 1e-4)


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["lsq", "nulsq", "apot", "lcq", "uniq"])
def test_kernel_after_a_batch_norm_of_every_method_width_and_type(name, bits, dtype):
    for signed in (False, True) if dtype == torch.float32 else (bits == 3,):
        quantizer = ready(name, bits, signed=signed).to(DEVICE)
        quantizer.does_relu = lambda unsigned=not signed: unsigned
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in tensors(4, 6, 5, 7, dtype=dtype))
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float64: 1e-10}[dtype]
        quantizer = to_float64(quantizer) if dtype == torch.float64 else quantizer
        assert_after_norm_equal_to_reference(quantizer, x, dy, affine_of(x, own=True), tolerance)


@kernel
@pytest.mark.parametrize("ste", ["clip", "none"])
def test_kernel_after_a_batch_norm_by_every_straight_through_rule(ste):
    for name in ("lsq", "nulsq"):
        quantizer = to_float64(ready(name, 2, signed=True, ste=ste).to(DEVICE))
        x, dy = tensors(4, 6, 5, 7, dtype=torch.float64)
        x[0, :, 0, 0] = torch.cat([quantizer.levels()[:4], torch.tensor([0.0, torch.inf]).to(x)])
        plain = Affine(*(torch.full((6,), value, dtype=torch.float64, device=DEVICE) for value in (0, 1, 0)))
        with torch.no_grad():
            assert_after_norm_equal_to_reference_without_sums(quantizer, x, dy, plain)


def assert_after_norm_equal_to_reference_without_sums(quantizer, x, dy, affine):
    table, rule = Table(*(None if t is None else t.detach() for t in quantizer.table())), quantizer.rule()
    rule = rule._replace(reduction="none")
    actual, expected = gpu.gradients(x, dy, table, rule, affine), reference.gradients(x, dy, table, rule)
    assert torch.equal(actual[0], expected[0])
    assert actual[1:4] == (None,) * 3
    torch.testing.assert_close(actual[5], expected[0].sum((0, 2, 3)), rtol=1e-12, atol=1e-12)


@kernel
def test_kernel_in_a_network(monkeypatch):
    """A folded network on the GPU's kernels, where the interpreter can run them on CPU tensors too, against the
    unfolded network: in training and in evaluation, running statistics too."""
    monkeypatch.setitem(kernels.KERNELS, DEVICE, gpu)
    monkeypatch.setattr(gpu, "available", lambda: True)
    model, images = test_fold.normed(memory=torch.channels_last, device=DEVICE)
    folded = copy.deepcopy(model)
    assert fold_(folded) == ["relu", "forked", "signed"]
    for training in (True, False):
        model.train(training), folded.train(training)
        test_fold.assert_same(test_fold.outcome(folded, images), test_fold.outcome(model, images))


# ---- without a GPU: the compiled code


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize(("name", "bits", "kind", "most"), [
    ("lsq", 4, torch.float32, 48), ("nulsq", 2, torch.float32, 38), ("nulsq", 3, torch.float32, 52),
    ("nulsq", 4, torch.float32, 90), ("nulsq", 4, torch.bfloat16, 90), ("nulsq", 6, torch.float32, 290),
    ("lcq", 4, torch.float32, 200)])
def test_compiled_for_sm_90_nothing_spills(name, bits, kind, most):
    """What training launches, alone and after a batch norm in both orders of memory; within `most` instructions an
    element. An H200 can issue about 100 of them in the time that bench.bandwidth's targets leave at 4 bits."""
    quantizer = ready(name, bits, signed=False)
    quantizer.does_relu = lambda: True
    cases = [(torch.channels_last, False), (torch.channels_last, True), (torch.contiguous_format, True)]
    for memory, after_norm in cases if (name, bits) == ("nulsq", 4) else cases[:2]:
        x, dy = (torch.randn(4, 16, 32, 32).to(kind).contiguous(memory_format=memory) for _ in range(2))
        launched = instructions.launches(quantizer, x, dy, after_norm)
        names = ["quantize", "gradients", "finish"] + ["norm_backward"] * after_norm
        assert [kernel.__name__ for kernel, *_ in launched] == names
        for launch in launched:
            try:
                actual = instructions.compile_for_sm_90(launch)
            except RuntimeError as error:
                pytest.skip(str(error))
            assert actual.registers <= (230 if bits == 6 else 160) and actual.spilled <= 16, actual
            assert launch[0].__name__ == "finish" or actual.instructions <= most, actual


# ---- on a GPU


class TestOnAGPU:
    pytestmark = pytest.mark.gpu

    def test_the_usual_choice_is_the_kernel(self):
        quantizer, (x, _) = ready("nulsq", 2).to("cuda"), tensors(100)
        assert type(quantizer(x.requires_grad_()).grad_fn).__name__ == "FusedBackward"

    def test_no_synchronization_and_the_same_bits_every_time(self):
        quantizer, (x, dy), actual = ready("nulsq", 3).to("cuda"), tensors(64, 1000), []
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                quantizer.zero_grad()
                quantizer(x).backward(dy)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            actual.append(quantizer.steps.grad.clone())
        assert torch.equal(*actual)

    def test_forward_and_backward_in_a_cuda_graph(self):
        quantizer, (x, dy) = ready("nulsq", 2).to("cuda"), tensors(64, 100)
        x.requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            quantizer(x).backward(dy)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        quantizer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.cuda.graph(graph):
            quantizer(x).backward(dy)
        with torch.no_grad():
            x.mul_(2)
        graph.replay()
        actual = [x.grad.clone(), quantizer.steps.grad.clone()]
        quantizer.zero_grad()
        x.grad = None
        with force("reference"):
            quantizer(x).backward(dy)
        torch.testing.assert_close(actual, [x.grad, quantizer.steps.grad], rtol=1e-5, atol=1e-5)
