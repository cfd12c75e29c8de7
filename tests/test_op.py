"""The fake-quantize operation: its forms against each other and against an independent definition in float64."""

import pytest
import torch

import nulsq
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import FORMS, fake_quantize, force
from tests.float64 import to_float64

FORMATS = [torch.contiguous_format, torch.channels_last]


def ready(name, bits, signed, dtype=torch.float32, **options):
    quantizer = nulsq.get_quantizer(name)(bits, "activation", signed=signed, **options)
    draw = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(0.2 + 0.4 * torch.rand(parameter.shape, generator=draw))
    quantizer.mark_calibrated_()
    return to_float64(quantizer) if dtype == torch.float64 else quantizer


def gradients(quantizer, x, dy, form=None):
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    y = fake_quantize(x, quantizer.table(), quantizer.rule(), form) if form else quantizer(x)
    y.backward(dy)
    return y.detach(), x.grad, [parameter.grad.clone() for parameter in quantizer.parameters()]


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("ste", ["clip", "none"])
@pytest.mark.parametrize(("name", "bits", "signed"), [
    ("nulsq", 2, False), ("nulsq", 4, False), ("nulsq", 3, True), ("nulsq", 8, True), ("lsq", 2, False),
    ("lsq", 4, True), ("minmax", 8, True)])
def test_all_forms_equal_the_reference(name, bits, signed, ste, memory):
    quantizer = ready(name, bits, signed, ste=ste)
    x = torch.randn(8, 5, 9, 9, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory)
    x[0, 0, 0, :4] = torch.tensor([0.0, torch.inf, -torch.inf, float(quantizer.levels()[-1])])
    y, dx, ds = gradients(quantizer, x, dy, "reference")
    for form in FORMS:
        other_y, other_dx, other_ds = gradients(quantizer, x, dy, form)
        assert torch.equal(y, other_y) and torch.equal(dx, other_dx)
        assert other_y.stride() == x.stride()
        for a, b in zip(ds, other_ds, strict=True):  # sums in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("ste", ["clip_open", "half"])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_rules_that_reproduce_other_implementations_have_the_reference_form_alone(ste, form):
    quantizer = ready("nulsq", 2, False, ste=ste)
    low, high = quantizer.levels()[[0, -1]].tolist()
    x = torch.tensor([low - 1, low, (low + high) / 2, high, high + 1], requires_grad=True)
    with force(form):
        y = quantizer(x)
    assert type(y.grad_fn).__name__ == "ReferenceBackward"
    y.sum().backward()
    at_the_ends = {"clip_open": 0.0, "half": 0.5}[ste]
    assert x.grad.tolist() == [0, at_the_ends, 1, at_the_ends, 0]


def straight_through(x, levels_of, steps):
    """Quantize by the definition with plain autograd: the level nearest to x among cumulative sums of the steps.

    x + (Q(x) - x).detach() has the right values; its gradient follows from u = (x - lower) / gap, y = lower + gap
    (u + (round(u) - u).detach()).
    """
    levels = levels_of(steps)
    upper = torch.searchsorted(levels.detach(), x.detach()).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    u = (x - low) / (high - low)
    inside = low + (high - low) * (u + ((u > 0.5).double() - u).detach())
    below, above = x < levels[0], x > levels[-1]
    return torch.where(below, levels[0], torch.where(above, levels[-1], inside))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_nulsq_gradients_equal_autograd_of_the_definition_in_float64(bits, signed, form):
    quantizer = ready("nulsq", bits, signed, torch.float64)
    count = 2 ** (bits - 1) if signed else 0

    def levels_of(steps):
        zero = torch.zeros(1, dtype=steps.dtype)
        return torch.cat([-steps[:count].cumsum(0).flip(0), zero, steps[count:].cumsum(0)])

    draw = torch.Generator().manual_seed(bits)
    x = torch.randn(5000, generator=draw, dtype=torch.float64) * 2
    dy = torch.randn(5000, generator=draw, dtype=torch.float64)
    y, dx, (ds,) = gradients(quantizer, x, dy, form)

    x2, steps = x.clone().requires_grad_(), quantizer.steps.detach().clone().requires_grad_()
    expected = straight_through(x2, levels_of, steps)
    expected.backward(dy)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ds, steps.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_equal_steps_make_nulsq_equal_lsq(bits, role):
    signed = role == "weight"
    lsq = to_float64(nulsq.get_quantizer("lsq")(bits, role, signed=signed))
    non_uniform = to_float64(nulsq.get_quantizer("nulsq")(bits, role, signed=signed))
    with torch.no_grad():
        lsq.step.fill_(0.37)
        non_uniform.steps.fill_(0.37)
    lsq.mark_calibrated_()
    non_uniform.mark_calibrated_()
    draw = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(4000, generator=draw, dtype=torch.float64) for _ in range(2))  # random: away from ties
    y, dx, (ds,) = gradients(lsq, x, dy)
    y2, dx2, (ds2,) = gradients(non_uniform, x, dy)
    torch.testing.assert_close(y, y2, rtol=1e-12, atol=1e-12)
    assert torch.equal(dx, dx2)
    torch.testing.assert_close(ds, ds2.sum().view(1), rtol=1e-9, atol=1e-9)


def test_per_channel_equals_one_quantizer_for_each_channel():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for name in nulsq.available():
        whole = nulsq.get_quantizer(name)(3, "weight", channels=3)
        whole.reset_(Statistics.of(x, per_channel=True))
        y, dx, ds = gradients(whole, x, dy)
        for c in range(3):
            single = nulsq.get_quantizer(name)(3, "weight")
            single.reset_(Statistics.of(x[c]))
            y_c, dx_c, ds_c = gradients(single, x[c], dy[c])
            assert torch.equal(y[c], y_c) and torch.equal(dx[c], dx_c)
            for a, b in zip(ds, ds_c, strict=True):
                torch.testing.assert_close(a[c].view(-1), b.view(-1), rtol=1e-5, atol=1e-5)


def test_gradient_scale_is_the_papers():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).relu()
    for name, count in (("lsq", 3), ("nulsq", 3)):
        plain, paper, channels = (ready(name, 2, False, grad_scale=scale) for scale in ("none", "lsq", "channels"))
        dy = torch.ones_like(x)
        unscaled = gradients(plain, x, dy)[2][0]
        torch.testing.assert_close(gradients(paper, x, dy)[2][0], unscaled / (48 * count) ** 0.5)
        torch.testing.assert_close(gradients(channels, x, dy)[2][0], unscaled / (3 * count) ** 0.5)


def test_minmax_range_is_the_running_average_of_the_batches_maxima():
    quantizer = nulsq.get_quantizer("minmax")(8, "activation", signed=True, momentum=0.25)
    quantizer.reset_(Statistics.of(torch.tensor([-2.0, 1.0])))
    x = torch.tensor([3.0, -4.0])
    before = quantizer(x)
    assert float(before.abs().max()) == 2.0  # forward uses the range as it was before the step
    quantizer.after_step_()
    assert float(quantizer.largest) == 2.0 + 0.25 * (4.0 - 2.0)
    quantizer.eval()(x * 100)
    quantizer.after_step_()
    assert float(quantizer.largest) == 2.5  # evaluation leaves it alone


@pytest.mark.parametrize("name", nulsq.available())
@pytest.mark.parametrize(("role", "bits", "channels"), [("activation", 2, None), ("activation", 3, None),
                                                        ("weight", 2, None), ("weight", 4, 4)])
def test_every_quantizer_compiles_without_a_graph_break(name, role, bits, channels):
    """fullgraph raises at a break; the backend runs what was traced, so no compiler is needed."""
    torch._dynamo.reset()
    quantizer = nulsq.get_quantizer(name)(bits, role, channels=channels, grad_scale="lsq")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 5, generator=draw, dtype=torch.float64)
    x = x if role == "weight" else x.relu()
    quantizer.reset_(Statistics.of(x, per_channel=channels is not None))
    to_float64(quantizer).eval()
    results = []
    for module in (quantizer, torch.compile(quantizer, fullgraph=True, backend="aot_eager")):
        y = module(x.clone().requires_grad_())
        quantizer.zero_grad()
        y.square().sum().backward()
        results.append((y.detach(), [parameter.grad.clone() for parameter in quantizer.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["lsq", "nulsq", "lcq"])
def test_vmap_over_the_parameters_alone_equals_a_call_for_each(name):
    """An ensemble of quantizers on one input; the table is batched, x is not."""
    quantizer = ready(name, 3, False)
    parameters = dict(quantizer.named_parameters())
    stacked = {key: torch.stack([value, 1.5 * value]).detach() for key, value in parameters.items()}
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).abs()

    def loss(parameters):
        return torch.func.functional_call(quantizer, parameters, (x,)).square().sum()

    batched = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i in range(2):
        single = torch.func.grad(loss)({key: value[i] for key, value in stacked.items()})
        for key in parameters:
            torch.testing.assert_close(batched[key][i], single[key], rtol=1e-5, atol=1e-5)
