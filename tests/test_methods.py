"""Each method against its published formulas, written out element by element in float64 with autograd."""

import pytest
import torch

import nulsq
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import FORMS, fake_quantize
from nulsq.quantizers.apot import magnitudes
from tests.float64 import to_float64

METHODS = ["lsq", "nulsq", "uniq", "apot", "lcq"]


def calibrated_quantizer(name, bits, signed, *, role="activation", seed=0, **options):
    """A float64 quantizer with random parameters."""
    quantizer = nulsq.get_quantizer(name)(bits, role, signed=signed, **options)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)
        for parameter in quantizer.positive_parameters():
            parameter.copy_(0.2 + 0.4 * torch.rand(parameter.shape, generator=draw))
        if name in ("apot", "lcq"):
            quantizer.alpha.fill_(1.7)
    quantizer.mark_calibrated_()
    return to_float64(quantizer)


def through(x, rounded):
    """The value of `rounded` with the gradient of x: the straight-through estimator."""
    return x + (rounded - x).detach()


def lsq(x, signed, bits, step):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    u = (x / step).clamp(low, high)
    return step * through(u, u.round())


def uniq(x, signed, bits, step):
    top = 2**bits - 1
    if not signed:
        u = (x / step).clamp(0, top)
        return step * through(u, u.round())
    alpha = step * top / 2
    u = ((x + alpha) / step).clamp(0, top)
    return step * through(u, u.round()) - alpha


def apot(x, signed, bits, alpha):
    units = torch.tensor(magnitudes(bits - 1 if signed else bits), dtype=torch.float64)
    units = torch.cat([-units.flip(0), units]) / units.max() if signed else units / units.max()
    u = (x / alpha).clamp(-1 if signed else 0, 1)
    nearest = units[(u[..., None] - units).abs().argmin(-1)]
    return alpha * through(u, nearest)


def lcq(x, signed, bits, alpha, theta=None):
    theta = torch.zeros(16, dtype=torch.float64) if theta is None else theta
    count = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    x = x if signed else x.clamp(min=0)
    v = (x.abs() / alpha).clamp(max=1)
    share = theta.softmax(0)
    slope, offset = 16 * share, share.cumsum(0) - share
    fixed = v.detach()
    i = (fixed * 16).long().clamp(max=15)
    compressed = slope[i] * (fixed - i / 16) + offset[i]
    rounded = through(compressed, (compressed * count).round() / count)
    k = (torch.searchsorted(offset.detach(), rounded.detach(), right=True) - 1).clamp(0, 15)
    expanded = (rounded - offset[k]) / slope[k] + k / 16
    return x.sign() * alpha * (expanded + v - fixed)  # the re-implementation's dy/dx of 1


def nulsq_levels(x, signed, bits, steps):
    below = 2 ** (bits - 1) if signed else 0
    zero = torch.zeros(1, dtype=torch.float64)
    levels = torch.cat([-steps[:below].cumsum(0).flip(0), zero, steps[below:].cumsum(0)])
    upper = torch.searchsorted(levels.detach(), x.detach()).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    u = ((x - low) / (high - low)).clamp(0, 1)
    return low + (high - low) * through(u, u.round())


DEFINITIONS = {"lsq": lsq, "uniq": uniq, "apot": apot, "lcq": lcq, "nulsq": nulsq_levels}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_equal_the_formulas(name, bits, signed, form):
    quantizer = calibrated_quantizer(name, bits, signed, seed=bits)
    draw = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(6000, generator=draw, dtype=torch.float64) for _ in range(2))  # random: away from ties
    parameters = {key: value.detach().clone().requires_grad_() for key, value in quantizer.named_parameters()}
    theirs = x.clone().requires_grad_()
    wanted = DEFINITIONS[name](theirs, signed, bits, *parameters.values())
    wanted.backward(dy)

    ours = x.clone().requires_grad_()
    y = fake_quantize(ours, quantizer.table(), quantizer.rule(), form)
    y.backward(dy)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for key, parameter in quantizer.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[key].grad, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lcq_levels_are_those_of_companding_each_element_in_float32(bits):
    """Thresholds found once instead. At most one of 6 million: where rounding makes the rule itself not monotone."""
    flips = 0
    for seed in range(3):
        quantizer = calibrated_quantizer("lcq", bits, False, seed=seed).float()
        x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(seed)).abs()
        with torch.no_grad():
            alpha, share = quantizer.alpha, quantizer.theta.softmax(0)
            slope, offset = 16 * share, share.cumsum(0) - share
            v = (x / alpha).clamp(max=1)
            i = (v * 16).long().clamp(max=15)
            code = ((slope[i] * (v - i / 16) + offset[i]) * (2**bits - 1)).round()
            flips += int((quantizer.encode(x) != code).sum())
    assert flips <= 1


@pytest.mark.parametrize(("name", "bits", "signed", "count"), [
    ("lsq", 2, True, 4), ("nulsq", 2, True, 4), ("uniq", 2, True, 4), ("uniq", 1, True, 2),
    ("apot", 2, True, 3), ("lcq", 2, True, 3), ("minmax", 2, True, 3),  # the published ones have no fourth
    ("apot", 4, True, 15), ("apot", 4, False, 16), ("lcq", 4, False, 16), ("lcq", 3, True, 7)])
def test_number_of_levels(name, bits, signed, count):
    assert len(calibrated_quantizer(name, bits, signed).levels()) == count


@pytest.mark.parametrize(("bits", "units"), [
    (2, [0, 1, 2, 4]), (3, [0, 1, 2, 3, 4, 6, 8, 10]),
    (4, [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]),
    (5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17, 20, 21, 24, 28, 32, 34, 36, 38, 48, 52, 64, 65, 68, 69, 72, 76,
         96, 100])])
def test_apot_levels_are_the_published_ones(bits, units):
    assert magnitudes(bits) == units


def test_apot_six_bits():
    units = magnitudes(6)
    assert len(set(units)) == 64 and units[-1] == 448


def test_apot_two_bit_weights_pass_the_whole_gradient():
    quantizer = calibrated_quantizer("apot", 2, True, role="weight")
    x = torch.tensor([-5.0, -1.0, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_uniq_at_one_bit_is_a_sign():
    quantizer = calibrated_quantizer("uniq", 1, True, role="weight")
    half = float(quantizer.step.detach()) / 2
    found = quantizer(torch.tensor([-3.0, -1e-9, 1e-9, 0.2], dtype=torch.float64)).tolist()
    assert found == [-half, -half, half, half]


def test_lcq_without_companding_is_uniform():
    quantizer = calibrated_quantizer("lcq", 3, False)
    with torch.no_grad():
        quantizer.theta.zero_()
    levels = quantizer.levels()
    torch.testing.assert_close(levels, torch.linspace(0, 1.7, 8, dtype=torch.float64))


def test_lcq_two_bit_weights_have_nothing_to_compand():
    quantizer = nulsq.get_quantizer("lcq")(2, "weight")
    assert quantizer.theta is None and dict(quantizer.named_parameters()).keys() == {"alpha"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shares", [1, 4])
def test_gradient_scale_of_the_whole_batch(name, shares):
    """`batch` counts the elements of the global batch, however many shares it comes in."""
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for scale in ("none", "batch"):
        quantizer = calibrated_quantizer(name, 3, False, grad_scale=scale)
        quantizer.batch_shards = shares
        quantizer(x).square().sum().backward()
        found.append([parameter.grad for parameter in quantizer.parameters()])
    elements, top = x.numel() * shares, 7
    factor = (top / elements) ** 0.5 if name in ("apot", "lcq") else 1 / (elements * top) ** 0.5
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain * factor)


# ---- initial steps


NORMAL = torch.special.ndtri((torch.arange(400_001, dtype=torch.float64) + 0.5) / 400_001).float()


@pytest.mark.parametrize(("bits", "steps", "mse"), [
    (2, [0.7646, 0.9596, 1.2240], 0.1351),
    (3, [0.4436, 0.4752, 0.5576, 0.7783, 0.5606, 0.6276, 0.8452], 0.0359),
    (4, [0.2430, 0.2479, 0.2584, 0.2763, 0.3053, 0.3535, 0.4425, 0.6538, 0.2739, 0.2809, 0.2964, 0.3237, 0.3712, 0.4604,
         0.6744], 0.00960)])
def test_lloyd_max_of_a_normal_tensor_with_a_level_at_zero(bits, steps, mse):
    """The optimum, negative side first. 1 %: the iteration stops where the error no longer shows it."""
    quantizer = nulsq.get_quantizer("nulsq")(bits, "weight", init="lloyd_max")
    quantizer.reset_(Statistics.of(NORMAL, histogram=True))
    torch.testing.assert_close(quantizer.steps.detach(), torch.tensor(steps), rtol=0.01, atol=0)
    assert float((quantizer(NORMAL) - NORMAL).square().mean().detach()) == pytest.approx(mse, rel=2e-3)


@pytest.mark.parametrize(("bits", "steps"), [
    (2, [0.5606, 0.6276, 0.8452]), (3, [0.2739, 0.2809, 0.2964, 0.3237, 0.3712, 0.4604, 0.6744])])
def test_lloyd_max_of_a_half_normal_tensor(bits, steps):
    quantizer = nulsq.get_quantizer("nulsq")(bits, "activation", init="lloyd_max")
    quantizer.reset_(Statistics.of(NORMAL.relu(), histogram=True))
    torch.testing.assert_close(quantizer.steps.detach(), torch.tensor(steps), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_beats_nmse_on_every_grid(name, channels, bits):
    """Heavy tails, three channels of different widths."""
    draw = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 3000, generator=draw) * torch.rand(3, 3000, generator=draw).add(0.05).reciprocal()
    x = x * torch.tensor([[0.01], [1.0], [30.0]])
    errors = []
    for init in ("nmse", "lloyd_max"):
        quantizer = nulsq.get_quantizer(name)(bits, "weight", init=init, channels=channels)
        quantizer.reset_(Statistics.of(x, per_channel=channels is not None, histogram=True))
        square = (quantizer(x) - x).square().detach()
        errors.append(square.mean(1) if channels else square.mean().view(1))
    assert (errors[1] < errors[0]).all()  # NMSE assumes a normal tensor, which this is not


def test_histograms_of_parts_add_up_and_keep_counts_and_sums():
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-5], [300.0]])
    whole = Statistics.of(x, per_channel=True, histogram=True).histogram
    parts = Statistics.of(x[:, :1234], per_channel=True, histogram=True).merge(
        Statistics.of(x[:, 1234:], per_channel=True, histogram=True)).histogram
    assert torch.equal(whole.count, parts.count)
    torch.testing.assert_close(whole.total, parts.total, rtol=1e-12, atol=1e-12)
    count, total = whole.cells(torch.tensor([[0.0], [0.0]]))
    assert torch.equal(count[:, 0], (x < 0).sum(1).double())
    torch.testing.assert_close(total, torch.stack([x.double().clamp(max=0).sum(1), x.double().clamp(min=0).sum(1)], 1))


def test_both_normalizations_are_one_network_before_a_batch_norm():
    """The batch norm undoes the deviation: same outputs, same gradients of weight and threshold (float64, tiny eps)."""
    found = []
    for normalization in ("wn", "lwn"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4, eps=1e-12)).double()
        policy = nulsq.Policy(bits=3, rules={}, weight=nulsq.SideRule(quantizer="apot", normalization=normalization),
                              activation=nulsq.SideRule(quantizer="fp"))
        nulsq.calibrate_(nulsq.quantize_(model, policy), [])
        to_float64(model).train()
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = model(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).sum().backward()
        found.append([y.detach(), model[0].weight.grad, model[0].weight_quantizer.alpha.grad])
    for wn, lwn in zip(*found, strict=True):
        torch.testing.assert_close(wn, lwn, rtol=1e-7, atol=1e-9)
