"""The fused form: equal to the reference in every corner, and through everything that torch does to an operation."""

import contextlib
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import nulsq
from bench.counts import Waits
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import FORMS, available, encode, fake_quantize, force, requantized
from nulsq.quant.op.cpu import build
from nulsq.quant.op.cpu import kernel as cpu
from nulsq.quant.op.reference import Rule, Table
from tests.float64 import to_float64

pytestmark = pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")
METHODS = ("lsq", "nulsq", "lcq", "apot", "uniq")


def tensors(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).to(dtype) for _ in range(2)]


def ready(name, bits, role="activation", signed=None, channels=None, ste=None, rows=8):
    quantizer = nulsq.get_quantizer(name)(bits, role, signed=signed, channels=channels, ste=ste)
    data = tensors(channels or rows, 999, seed=bits)[0]
    quantizer.reset_(Statistics.of(data, per_channel=channels is not None))
    return quantizer


def run(quantizer, x, dy, form=None):
    x = x.detach().clone().requires_grad_()
    quantizer.zero_grad()
    with force(form):
        y = quantizer(x)
    y.backward(dy)
    return y.detach(), x.grad, [p.grad.clone() for p in quantizer.parameters()]


def assert_equal_to_reference(quantizer, x, dy, tolerance=1e-5):
    y, dx, ds = run(quantizer, x, dy, "fused")
    expected_y, expected_dx, expected_ds = run(quantizer, x, dy, "reference")
    assert torch.equal(y, expected_y) and torch.equal(dx, expected_dx)
    assert y.stride() == x.stride() and y.dtype == x.dtype
    for a, b in zip(ds, expected_ds, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


# ---- equal to the reference


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_type_and_width_equals_the_reference(name, bits, kind):
    """Tensors of several pieces: beyond 32 levels the kernel looks up by buckets where a tensor is large enough."""
    try:
        quantizer = ready(name, bits)
    except ValueError:
        pytest.skip(f"{name} has no {bits} bits")
    x, dy = tensors(3, 7, 31, 29, dtype=kind)
    assert_equal_to_reference(to_float64(quantizer) if kind == torch.float64 else quantizer, x, dy)


@pytest.mark.parametrize(("x_type", "table_type"), [
    (torch.bfloat16, torch.float64), (torch.float16, torch.float64), (torch.float32, torch.float64),
    (torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("name", METHODS)
def test_a_table_of_another_type_than_x(name, x_type, table_type):
    """16-bit numbers are never computed with: a network in bfloat16 has levels in float32."""
    quantizer, (x, dy) = ready(name, 3).to(table_type), tensors(3, 7, 31, 29, dtype=x_type)
    assert_equal_to_reference(quantizer, x, dy, tolerance=2**-7 if table_type == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", [*METHODS, "minmax"])
def test_the_relu_before_a_quantizer_can_be_left_to_it(name, signed, form):
    quantizer, (x, dy) = ready(name, 3, signed=signed), tensors(3, 7, 31, 29)
    x[0, 0, 0, :6] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.inf, -torch.inf])
    for each in ("clip", "clip_open", "half", "none"):
        quantizer.ste = each
        before = x.clone().requires_grad_()
        quantizer.zero_grad()
        with force(form):
            y = fake_quantize(before.relu(), quantizer.table(quantizer._elements(x)), quantizer.rule())
        y.backward(dy)
        expected = [p.grad.clone() for p in quantizer.parameters()]
        folded = x.clone().requires_grad_()
        quantizer.zero_grad()
        with force(form):
            other = fake_quantize(folded, quantizer.table(quantizer._elements(x)),
                                  quantizer.rule()._replace(relu=True))
        other.backward(dy)
        assert torch.equal(y, other) and torch.equal(before.grad, folded.grad)
        for a, b in zip(quantizer.parameters(), expected, strict=True):
            assert torch.equal(a.grad, b)
        assert torch.equal(encode(x, quantizer.table(), quantizer.rule()._replace(relu=True)),
                           encode(x.relu(), quantizer.table(), quantizer.rule()))


@pytest.mark.parametrize("name", METHODS)
def test_weights_with_a_table_for_each_channel_equal_the_reference(name):
    x, dy = tensors(6, 5, 3, 3)
    for memory in (torch.contiguous_format, torch.channels_last):
        quantizer = ready(name, 3, "weight", channels=6)
        assert_equal_to_reference(quantizer, x.contiguous(memory_format=memory), dy.contiguous(memory_format=memory))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_numbers_at_thresholds_ends_and_beyond_equal_the_reference(name, bits):
    try:
        quantizer = ready(name, bits, signed=True)
    except ValueError:
        pytest.skip(f"{name} has no {bits} bits")
    marks = torch.cat([quantizer.levels(), quantizer.thresholds()])
    away = torch.full_like(marks, torch.inf)
    x = torch.cat([marks, torch.nextafter(marks, away), torch.nextafter(marks, -away), marks * 2,
                   torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, 3e38])]).repeat(29)  # enough for buckets
    assert_equal_to_reference(quantizer, x, torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    assert quantizer(torch.tensor([torch.nan, 0.0]).repeat(5000)).isnan().sum() == 5000


@pytest.mark.parametrize("shape", [(0,), (1,), (), (3, 1, 5), (2, 0, 4), (8193,)])
def test_any_shape(shape):
    quantizer = ready("nulsq", 2)
    assert_equal_to_reference(quantizer, torch.randn(shape), torch.randn(shape))


def test_input_and_gradient_with_gaps_in_memory():
    x, dy = tensors(4, 6, 10, 10)
    quantizer = ready("nulsq", 3)
    y, dx, ds = run(quantizer, x, dy)
    wide = torch.stack([x, x], -1)[..., 0]
    again = wide.detach().requires_grad_()
    quantizer.zero_grad()
    out = quantizer(again)
    out.backward(torch.stack([dy, dy], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(out, y) and torch.equal(again.grad, dx)
    assert torch.equal(quantizer.steps.grad, ds[0])


@pytest.mark.parametrize("name", ["lsq", "nulsq", "lcq"])
def test_any_number_of_threads_gives_the_same_bits(name):
    x, dy = tensors(16, 16, 32, 33)
    quantizer, before, actual = ready(name, 4), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            actual.append(run(quantizer, x, dy))
    finally:
        torch.set_num_threads(before)
    for y, dx, ds in actual[1:]:
        assert torch.equal(y, actual[0][0]) and torch.equal(dx, actual[0][1])
        assert all(torch.equal(a, b) for a, b in zip(ds, actual[0][2], strict=True))


def test_frozen_parameters_cost_no_sums():
    quantizer = ready("nulsq", 2).requires_grad_(False)
    x = torch.randn(50, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and quantizer.steps.grad is None


# ---- through what torch does to an operation


def test_force_takes_the_named_form_and_refuses_others():
    x = torch.randn(100, requires_grad=True)
    quantizer = ready("nulsq", 2)
    for form, node in (("reference", "Reference"), ("eager", "Eager"), ("fused", "Fused"), (None, "Fused")):
        with force(form):
            assert type(quantizer(x).grad_fn).__name__ == node + "Backward"
    with pytest.raises(ValueError, match="form = 'fast', allowed: reference, eager, fused"), force("fast"):
        pass


def test_the_operators_keep_torchs_contract():
    """Schema, fake tensors, autograd registration and tracing, as torch checks them itself."""
    for name, role, channels in (("lsq", "activation", None), ("nulsq", "weight", 6), ("lcq", "activation", None)):
        quantizer = ready(name, 3, role, channels=channels)
        x = torch.randn(6, 20, requires_grad=True)
        table = Table(*(None if t is None else t.detach().requires_grad_(field == "gaps")
                        for field, t in quantizer.table()._asdict().items()))
        torch.library.opcheck(torch.ops.nulsq.quantize.default, (x, *table, *quantizer.rule()))


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_quantizer_has_one_graph_and_at_most_two_for_any_shapes(name):
    """After eight recompilations torch.compile silently runs eager; here shapes become symbols after the second."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    quantizer = ready(name, 2)
    quick = torch.compile(quantizer, fullgraph=True, backend=graphs)
    for size in range(2, 16):
        x, dy = tensors(size, 3, size + 1, size + 2, seed=size)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = quick(a), quantizer(b)
        y.backward(dy)
        expected.backward(dy)
        assert torch.equal(y, expected) and torch.equal(a.grad, b.grad)
    assert graphs.frame_count <= 2


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(),
                        nn.Linear(4 * 6 * 6, 5))
    nulsq.quantize_(net)
    return nulsq.calibrate_(net, [torch.randn(4, 3, 12, 12)])


def gradients_of(net, run):
    net.zero_grad()
    run(net).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_a_compiled_network_equals_eager_in_float64():
    torch._dynamo.reset()
    net, x = to_float64(network()), torch.randn(4, 3, 12, 12, dtype=torch.float64)
    same(gradients_of(torch.compile(net, fullgraph=True, backend="aot_eager"), lambda n: n(x)),
         gradients_of(net, lambda n: n(x)))


def test_a_convolution_that_makes_its_input_again_keeps_less_and_has_the_same_gradients(monkeypatch):
    net, x = network(), torch.randn(4, 3, 12, 12)

    def bytes_kept():
        """What is allocated in the forward pass and not freed in it."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            y = net(x)
        return sum(event.self_cpu_memory_usage for event in profile.key_averages()), y

    expected, (kept, _) = gradients_of(net, lambda n: n(x)), bytes_kept()
    monkeypatch.setattr("nulsq.quant.layers.requantized", lambda y: contextlib.nullcontext())
    actual, (kept_without, _) = gradients_of(net, lambda n: n(x)), bytes_kept()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert kept_without - kept >= 4 * 8 * 10 * 10 * 4  # the input of the one convolution that nuLSQ quantizes


def test_requantized_leaves_other_tensors_alone():
    for y in (torch.randn(3), torch.randn(3, requires_grad=True) * 2):
        with requantized(y):
            z = (y.requires_grad_() if y.is_leaf else y).square()
        z.sum().backward()


def test_activation_checkpointing():
    net, x = network(), torch.randn(4, 3, 12, 12)
    expected = gradients_of(net, lambda n: n(x))
    for reentrant in (False, True):
        same(gradients_of(net, lambda n: checkpoint(n, x.clone().requires_grad_(), use_reentrant=reentrant)), expected)  # noqa: B023


@pytest.mark.parametrize("form", ["reference", "fused"])
def test_functional_transforms(form):
    net, x = nn.Sequential(network()[2]), torch.randn(4, 8, 12, 12)  # without the edges, which write their ranges
    expected = gradients_of(net, lambda n: n(x))
    parameters = dict(net.named_parameters())
    with force(form):
        actual = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().sum())(parameters)
    same([actual[name] for name in parameters], expected)


def test_gradients_of_each_sample_by_vmap_add_up_to_those_of_the_batch():
    net, x = nn.Sequential(network()[2]), torch.randn(4, 8, 12, 12)
    net[0].weight_quantizer = ready("nulsq", 2, "weight", channels=8)
    parameters = dict(net.named_parameters())

    def loss(p, sample):
        return torch.func.functional_call(net, p, (sample.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n, sample in enumerate(x):
        same([each[name][n] for name in parameters], gradients_of(net, lambda net: net(sample.unsqueeze(0))))  # noqa: B023
    same([each[name].sum(0) for name in parameters], gradients_of(net, lambda n: n(x)))


def test_autocast_feeds_bfloat16_and_gradients_come_back_in_the_parameters_type():
    net, x = network(), torch.randn(4, 3, 12, 12)
    inputs = []
    net[2].activation_quantizer.register_forward_hook(lambda module, args, y: inputs.append((args[0].dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().sum()
    loss.backward()
    assert inputs == [(torch.bfloat16, torch.bfloat16)]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_steps_have_no_synchronizations():
    """Reading a number on the host would stop a GPU at every quantizer."""
    for name in METHODS:
        quantizer, (x, dy) = ready(name, 3), tensors(100)
        with Waits() as waits:
            quantizer(x.requires_grad_()).backward(dy)
        assert waits.count == 0, name


# ---- a machine without a compiler


def test_without_a_compiler_plain_pytorch_serves_after_one_warning(tmp_path):
    code = ("import torch, nulsq, warnings\n"
            "from nulsq.quant.op import available\n"
            "q = nulsq.get_quantizer('nulsq')(2, 'activation', signed=False)\n"
            "from nulsq.quant.calibration.statistics import Statistics\n"
            "q.reset_(Statistics.of(torch.rand(100)))\n"
            "x = torch.rand(100, requires_grad=True)\n"
            "with warnings.catch_warnings(record=True) as told:\n"
            "    warnings.simplefilter('always')\n"
            "    for _ in range(3): y = q(x)\n"
            "y.sum().backward()\n"
            "print(len(told), type(y.grad_fn).__name__, available('cpu'), told[0].message)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "CXX": "/nonexistent/c++", "NULSQ_CACHE": str(tmp_path)})
    assert done.stdout.startswith("1 EagerBackward False no compiled quantizers on this machine, plain PyTorch serves")
    assert "/nonexistent/c++" in done.stdout


@pytest.fixture
def no_library(tmp_path, monkeypatch):
    """Nothing is compiled yet: the folder that is looked into."""
    monkeypatch.setenv("NULSQ_CACHE", str(tmp_path))
    cpu._library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu._library.cache_clear()


def test_a_compiler_that_fails_says_why(no_library, monkeypatch):
    broken = no_library / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'fatal: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match="fatal: no such header"):
        assert not cpu.available()
    assert list(no_library.glob("*.so")) == []


def test_the_compiled_kernel_is_kept(tmp_path, monkeypatch):
    first = build.compiled_library()
    monkeypatch.setattr(subprocess, "run", lambda command, **options: _only_version(command, options))
    assert build.compiled_library() == first


def _only_version(command, options, run=subprocess.run):
    assert command[1:] == ["--version"], "compiled again"
    return run(command, **options)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of an x86-64")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx2"])
def test_a_processor_with_narrower_vectors_gives_the_same(without, no_library, monkeypatch):
    """Compiled for an older one than this."""
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, without))
    assert cpu.available()
    for name in METHODS:
        for bits in (2, 3, 4):
            test_numbers_at_thresholds_ends_and_beyond_equal_the_reference(name, bits)
            quantizer = ready(name, bits)
            assert_equal_to_reference(quantizer, *tensors(3, 20_001, seed=bits))
            assert_equal_to_reference(quantizer, *tensors(3, 20_001, seed=bits, dtype=torch.float64))
    assert list(no_library.glob("*.so"))


def test_the_smallest_table_there_is():
    """One threshold, two levels."""
    table = Table(torch.ones(1), torch.tensor([0.0, 1.0]), torch.tensor([0.5]))
    rule = Rule("table", "clip", "per_gap", (0, 1), (False,))
    y = fake_quantize(torch.tensor([-1.0, 0.5, 0.6]), table, rule, "fused")
    assert y.tolist() == [0, 0, 1]


def test_next_to_every_tie_the_kernel_rounds_as_the_reference_does():
    """A product with the step's reciprocal in place of the division would fall to the other side here and there."""
    draw = torch.Generator().manual_seed(0)
    for bits, signed in ((2, False), (3, True), (4, False), (8, True)):
        quantizer = ready("lsq", bits, signed=signed)
        low, high = quantizer.level_range
        ties = torch.arange(low - 2, high + 2) + 0.5
        for step in torch.cat([torch.rand(40, generator=draw), torch.logspace(-7, 7, 15)]):
            quantizer.step.data.fill_(step)
            x, beside = ties * step, []
            for toward in (-torch.inf, torch.inf):
                moved = x
                for _ in range(4):
                    moved = moved.nextafter(torch.tensor(toward))
                    beside.append(moved)
            x = torch.cat([x, *beside, step * torch.randn(4096, generator=draw) * high,
                           torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 1e-30, 0.0])])
            assert_equal_to_reference(quantizer, x, torch.ones_like(x))
