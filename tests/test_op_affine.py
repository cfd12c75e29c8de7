"""A batch norm as part of a quantizer's pass: the kernels equal plain PyTorch for every layout and channel count."""

import itertools

import pytest
import torch
from torch import nn

import nulsq
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import Affine, Table, available, fake_quantize
from nulsq.quant.op.batch_affine import batch_affine
from nulsq.quant.op.cpu import kernel as cpu
from tests.float64 import to_float64

pytestmark = pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")
METHODS = ("lsq", "nulsq", "lcq", "apot", "uniq")
# rows of channels: less than a vector, whole vectors, vectors and a rest; planes likewise; one piece and several
SHAPES = [(4, 3, 5, 7), (2, 16, 9, 9), (3, 19, 31, 29), (2, 64, 17, 16), (5, 1, 8, 8), (40, 33, 1, 1), (2, 300, 12, 12)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def tensors(shape, memory, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).to(dtype).contiguous(memory_format=memory) for _ in range(2)]


def norm_of(count, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    values = (torch.randn(count, generator=draw), torch.rand(count, generator=draw) + 0.5,
              torch.randn(count, generator=draw) / 2)
    return Affine(*(each.to(dtype).requires_grad_() for each in values))


def ready(name, bits, signed=False):
    quantizer = nulsq.get_quantizer(name)(bits, "activation", signed=signed)
    quantizer.reset_(Statistics.of(torch.randn(999, generator=torch.Generator().manual_seed(bits)).abs()))
    return quantizer


def outcome(quantizer, x, dy, affine, form, relu=True):
    """y and the gradients of x, the map (what of it has one) and the quantizer's parameters."""
    x = x.detach().requires_grad_()
    expected = [x, *(each for each in affine[:3] if each.requires_grad), *quantizer.parameters()]
    y = fake_quantize(x, quantizer.table(), quantizer.rule()._replace(relu=relu), form, affine)
    return y.detach(), torch.autograd.grad(y, expected, dy)


def assert_equal_to_reference(quantizer, x, dy, affine, tolerance, relu=True):
    y, actual = outcome(quantizer, x, dy, affine, "fused", relu)
    expected_y, expected = outcome(quantizer, x, dy, affine, "reference", relu)
    assert torch.equal(y, expected_y) and y.stride() == x.stride() and y.dtype == x.dtype
    assert actual[0].stride() == x.stride() and actual[0].dtype == x.dtype
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_reference_on_every_shape(name, shape, memory):
    """Levels bit for bit: kernel and plain PyTorch map x by the same multiplication and the same addition."""
    for bits in (2, 3, 4):
        for kind, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 2**-7)):
            quantizer, affine = ready(name, bits), norm_of(shape[1], torch.promote_types(kind, torch.float32))
            quantizer = to_float64(quantizer) if kind == torch.float64 else quantizer
            assert_equal_to_reference(quantizer, *tensors(shape, memory, kind), affine, tolerance)


@pytest.mark.parametrize("ste", ["clip", "clip_open", "half", "none"])
@pytest.mark.parametrize("signed", [False, True])
def test_every_straight_through_rule_with_and_without_a_relu(ste, signed):
    for relu in (False, True):
        quantizer = to_float64(ready("nulsq", 3, signed))
        quantizer.ste = ste
        x, dy = tensors((3, 19, 31, 29), torch.channels_last, torch.float64)
        assert_equal_to_reference(quantizer, x, dy, norm_of(19, torch.float64), 1e-12, relu)


def test_an_empty_batch_has_no_gradients():
    quantizer, affine = ready("nulsq", 2), norm_of(5)
    y, (dx, *rest) = outcome(quantizer, torch.empty(0, 5, 4, 4), torch.empty(0, 5, 4, 4), affine, "fused")
    assert y.shape == dx.shape == (0, 5, 4, 4) and all(not each.any() for each in rest)


def test_the_number_of_threads_changes_no_bit():
    quantizer, affine = ready("nulsq", 4), norm_of(24)
    x, dy = tensors((8, 24, 31, 29), torch.channels_last)
    actual = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y, gradients = outcome(quantizer, x, dy, affine, "fused")
        own, mean, var = batch_affine(x, affine.scale, affine.bias, 1e-5)
        actual.append([y, *gradients, mean, var, *outcome(quantizer, x, dy, own, "fused")[1]])
    assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_mean_and_variance(shape, memory):
    x = tensors(shape, memory)[0] * 3
    for offset, tolerance in ((0, 5e-6), (1e4, 1e-5)):  # a mean three thousand times the deviation
        moved = x + offset
        var, mean = torch.var_mean(moved.double(), (0, 2, 3), correction=0)
        actual = cpu.moments(moved)
        torch.testing.assert_close(actual[0].double(), mean, rtol=1e-6, atol=3e-6)  # a millionth of the deviation
        torch.testing.assert_close(actual[1].double(), var, rtol=tolerance, atol=tolerance)
        assert all(torch.equal(a, b) for a, b in zip(cpu.moments(moved.bfloat16()),
                                                     cpu.moments(moved.bfloat16().float()), strict=True))


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (40, 33, 1, 1)], ids=str)
def test_a_batchs_own_map_is_batch_norm(shape, memory):
    """Output and all gradients, those through the statistics too."""
    norm, (x, dy) = nn.BatchNorm2d(shape[1]).double(), tensors(shape, memory, torch.float64)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias)
    x.requires_grad_()
    expected_y = norm(x)
    expected = torch.autograd.grad(expected_y, [x, *norm.parameters()], dy)
    affine, mean, var = batch_affine(x, norm.weight, norm.bias, norm.eps)
    y = affine.of(x)
    actual = torch.autograd.grad(y, [x, *norm.parameters()], dy)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert not mean.requires_grad and not var.requires_grad


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("ste", ["clip", "half", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_a_compilers_gradients_are_the_kernels(name, ste, memory):
    """The operators in a compiled graph against direct calls of the kernels."""
    torch._dynamo.reset()
    quantizer, (x, dy) = to_float64(ready(name, 2)), tensors((3, 19, 7, 5), memory, torch.float64)
    quantizer.ste = ste
    weight, _, bias = norm_of(19, torch.float64)[:3]

    def step(x, weight, bias):
        affine, mean, var = batch_affine(x, weight, bias, 1e-5)
        y = fake_quantize(x, quantizer.table(), quantizer.rule()._replace(relu=True), affine=affine)
        return y, mean, var

    x.requires_grad_()
    expected, actual = step(x, weight, bias), torch.compile(step, backend="aot_eager", fullgraph=True)(x, weight, bias)
    for each in (expected, actual):
        assert not each[1].requires_grad and not each[2].requires_grad
    inputs = [x, weight, bias, *quantizer.parameters()]
    expected, actual = ([*each, *torch.autograd.grad(each[0], inputs, dy)] for each in (expected, actual))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(b.detach().abs().max()))


@pytest.mark.parametrize("own", [True, False], ids=["own statistics", "fixed"])
@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (40, 33, 1, 1)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_after_a_batch_norm_every_method_equals_the_reference(name, shape, memory, own):
    """With what goes through the statistics, every straight-through rule."""
    cases = itertools.product((2, 3, 4), ((True, False), (True, True), (False, True)))
    for (bits, (relu, signed)), ste in zip(cases, itertools.cycle(["clip", "none"]), strict=False):
        for kind, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-5), (torch.bfloat16, 2**-6)):
            computed = torch.promote_types(kind, torch.float32)
            quantizer, (x, dy) = ready(name, bits, signed).to(computed), tensors(shape, memory, kind)
            quantizer.ste, affine = ste, norm_of(shape[1], computed)
            if own:
                affine, *_ = batch_affine(x, affine.scale, affine.bias, 1e-5)
            assert_gradients_equal_to_the_reference(quantizer, x, dy, affine, relu, tolerance)


def assert_gradients_equal_to_the_reference(quantizer, x, dy, affine, relu, tolerance):
    expected = outcome(quantizer, x, dy, affine, "reference", relu)[1]
    given = [None if each is None else each.detach() for each in affine]
    expected_dx, expected_lines = expected[0], expected[1:3 if affine.rstd is not None else 4]
    arguments = (Table(*(None if each is None else each.detach() for each in quantizer.table())),
                 quantizer.rule()._replace(relu=relu), Affine(*given))
    dx, *sums = cpu.gradients(x, dy, *arguments)
    torch.testing.assert_close(dx, expected_dx, rtol=tolerance, atol=tolerance * float(expected_dx.abs().max()))
    norm_gradients = sums[3:] if affine.rstd is not None else (-affine.scale * sums[4], *sums[3:])
    for a, b in zip(norm_gradients, expected_lines, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_second_derivatives_under_transforms_are_those_of_batch_norm():
    (x, direction), (weight, bias) = tensors((2, 3, 4, 4), torch.contiguous_format, torch.float64), torch.rand(2, 3)
    weight, bias = weight.double(), bias.double()

    def by_affine(x):
        return batch_affine(x, weight, bias, 1e-5)[0].of(x).pow(3).sum()

    def by_torch(x):
        return nn.functional.batch_norm(x, None, None, weight, bias, training=True).pow(3).sum()

    actual, expected = (torch.func.jvp(torch.func.grad(each), (x,), (direction,))[1] for each in (by_affine, by_torch))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_the_operators_keep_torchs_contract():
    """Schema and fake tensors, as torch checks them itself; and they are the kernel's functions."""
    (x, dy), affine = tensors((3, 19, 7, 5), torch.channels_last), [each.detach() for each in norm_of(19)[:3]]
    torch.library.opcheck(torch.ops.nulsq.moments.default, (x,))
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for name, inverse in itertools.product(METHODS, (None, torch.rand(19))):
        quantizer = ready(name, 3)
        gradients = torch.ops.nulsq.gradients_after_norm
        with torch.no_grad():
            arguments = quantizer.table(), quantizer.rule(), Affine(*affine[:3], inverse)
        rest = [each for part in arguments for each in part]
        torch.library.opcheck(gradients.default, (x, dy, *rest), **checks)
        assert_same_results(gradients(x, dy, *rest), cpu.gradients(x, dy, *arguments))


def assert_same_results(operators, functions):
    """An operator has an empty tensor where the kernel's function has None."""
    for told, expected in zip(operators, functions, strict=True):
        assert torch.equal(told, told.new_empty(0) if expected is None else expected)


def test_an_incoming_gradient_that_a_hook_keeps_is_unchanged():
    quantizer, (x, dy) = ready("nulsq", 2), tensors((2, 16, 8, 8), torch.channels_last)
    weight, bias, held = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True), dy.clone()
    x.requires_grad_()
    seen, gradients = [], []
    for form in ("fused", "reference"):
        affine, *_ = batch_affine(x, weight, bias, 1e-5)
        y = fake_quantize(x, quantizer.table(), quantizer.rule(), form, affine)
        y.register_hook(seen.append)
        x.grad = None
        (y * 1).backward(dy)  # the product's gradient is a tensor of its own, which the hook keeps
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert torch.equal(dy, held) and all(torch.equal(each, held) for each in seen)
