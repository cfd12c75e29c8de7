"""Oscillating weights and batch-norm re-estimation: against a slow oracle, on uniform and learned grids."""

import bisect
import copy
import math

import pytest
import torch
from torch import nn

import nulsq
from nulsq.config import Recipe, load
from nulsq.errors import InputError
from nulsq.quant.batch_norm import freeze_batch_norm_, reestimate_batch_norm_
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.layers import QuantConv2d, QuantLinear, quantize_layer_
from nulsq.quant.oscillation import Oscillations, dampening_loss, oscillating_fraction
from nulsq.quant.settings import OscillationSettings
from tests.float64 import to_float64

GRIDS = [("lsq", 2, False), ("nulsq", 3, False), ("nulsq", 2, True), ("uniq", 1, False), ("lsq", 4, True)]
NORMALIZED = [("lcq", "lwn"), ("apot", "wn")]


def quantized(name, bits, per_channel=False, normalization="none", kind=QuantConv2d, seed=0):
    """A calibrated layer of 4 output channels in a model; steps of nuLSQ are made unequal."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(3, 4, 3) if kind is QuantConv2d else nn.Linear(27, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.bias.zero_()
    quantizer = nulsq.get_quantizer(name)(bits, "weight", channels=4 if per_channel else None)
    layer = quantize_layer_(layer, quantizer, None, normalization)
    quantizer.reset_(Statistics.of(layer.normalized_weight()[0].detach(), per_channel=per_channel))
    with torch.no_grad():
        if name == "nulsq":
            quantizer.steps.mul_(0.6 + 0.8 * torch.rand(quantizer.steps.shape, generator=generator))
    return nn.Sequential(layer), layer


class Slow:
    """The definition, weight by weight, in Python's float64."""

    def __init__(self, momentum):
        self.momentum, self.weights = momentum, None

    def step(self, weights, thresholds, levels, limit):
        """What the weights are after the step; `thresholds` and `levels` for each weight."""
        index = [bisect.bisect_left(t, w) for w, t in zip(weights, thresholds, strict=True)]
        if self.weights is None:
            self.weights = [{"index": i, "direction": 0, "frequency": 0.0, "average": float(i), "frozen": False}
                            for i in index]
            return weights
        m, after = self.momentum, []
        for w, i, one, level in zip(weights, index, self.weights, levels, strict=True):
            i = one["index"] if one["frozen"] else i
            oscillation = 0.0
            if i != one["index"]:
                direction = 1 if i > one["index"] else -1
                oscillation = 1.0 if direction == -one["direction"] else 0.0
                one["direction"] = direction
            one["frequency"] = m * oscillation + (1 - m) * one["frequency"]
            one["average"] = m * i + (1 - m) * one["average"]
            one["index"] = i
            if limit is not None and one["frequency"] > limit and not one["frozen"]:
                one["frozen"], one["index"] = True, round(one["average"])
            after.append(level[one["index"]] if one["frozen"] else w)
        return after


@pytest.mark.parametrize(("name", "bits", "per_channel"), GRIDS)
@pytest.mark.parametrize("kind", [QuantConv2d, QuantLinear])
def test_tracking_and_freezing_equal_the_slow_oracle(name, bits, per_channel, kind):
    model, layer = quantized(name, bits, per_channel, kind=kind)
    settings = OscillationSettings(momentum=0.2, freeze_threshold=0.5, freeze_final=0.4, start=0.5)
    oscillations, slow, steps = Oscillations(model, settings), Slow(0.2), 30
    tracker, generator = layer.oscillation, torch.Generator().manual_seed(1)

    def ends():
        """Thresholds and levels of each weight, as lists."""
        return [each.expand(4, -1).repeat_interleave(layer.weight[0].numel(), 0).tolist()
                for each in (layer.weight_quantizer.thresholds(), layer.weight_quantizer.levels())]

    slow.step(layer.weight.flatten().tolist(), *ends(), None)
    frozen = 0
    for step in range(steps):
        with torch.no_grad():  # the grid learns, and the weights jump about thresholds: a step of the optimizer
            for parameter in layer.weight_quantizer.parameters():
                parameter.mul_(1 + 0.02 * (torch.rand(parameter.shape, generator=generator) - 0.5))
            layer.weight.add_(0.5 * torch.randn(layer.weight.shape, generator=generator))
        done = (step + 1) / steps
        wanted = slow.step(layer.weight.flatten().tolist(), *ends(), oscillations.threshold(done))
        oscillations.after_step_(done)
        for key in ("index", "direction", "frozen"):
            assert getattr(tracker, key).flatten().tolist() == [one[key] for one in slow.weights], (key, step)
        for key in ("frequency", "average"):
            found = getattr(tracker, key).flatten().double()
            # float32 against float64 over 30 steps of numbers below 16
            torch.testing.assert_close(found, torch.tensor([one[key] for one in slow.weights], dtype=torch.float64),
                                       rtol=1e-5, atol=1e-6)
        assert layer.weight.flatten().tolist() == wanted
        frozen = tracker.frozen.sum()
    assert 0 < frozen < layer.weight.numel()
    assert [(k, v.dtype) for k, v in tracker.state_dict().items()] == [
        ("index", torch.uint8), ("direction", torch.int8), ("frequency", torch.float32), ("average", torch.float32),
        ("frozen", torch.bool)]


def training(model, layer, settings, steps=40, lr=0.3):
    """Steps with momentum and weight decay on a task that leaves weights between levels; yields after each."""
    generator = torch.Generator().manual_seed(2)
    goal = torch.randn(layer.weight.shape, generator=generator)
    grid = list(layer.weight_quantizer.parameters())
    optimizer = torch.optim.SGD([{"params": [layer.weight, layer.bias]}, {"params": grid, "lr": lr / 20}], lr=lr,
                                momentum=0.5, weight_decay=1e-2)
    nulsq.follow_step_(optimizer, model)
    oscillations = Oscillations(model, settings)
    for step in range(steps):
        loss = (layer.quantized_weight() - goal).square().sum() / 8
        dampening = oscillations.dampening(step / steps)
        (loss if dampening is None else loss + dampening).backward()
        optimizer.step()
        optimizer.zero_grad()
        oscillations.after_step_((step + 1) / steps)
        yield oscillations


@pytest.mark.parametrize(("name", "bits", "per_channel"), GRIDS)
def test_a_frozen_weight_is_its_level_while_the_grid_learns(name, bits, per_channel):
    model, layer = quantized(name, bits, per_channel)
    frozen = index = None
    grids = set()
    for _ in training(model, layer, OscillationSettings(momentum=0.2, freeze_threshold=0.4, start=0.0)):
        tracker, quantizer = layer.oscillation, layer.weight_quantizer
        grids.add(quantizer.levels()[..., -1].sum().item())
        if frozen is not None:
            assert tracker.frozen[frozen].all() and torch.equal(tracker.index[frozen], index)
        frozen, index = tracker.frozen.clone(), tracker.index[tracker.frozen]
        assert torch.equal(layer.weight[frozen], quantizer.decode(tracker.index.long())[frozen])
        assert torch.equal(quantizer.encode(layer.weight.detach())[frozen], index.long())
    assert frozen.any() and len(grids) == 40


@pytest.mark.parametrize(("name", "normalization"), NORMALIZED)
def test_a_frozen_normalized_weight_keeps_its_level_and_the_layer_its_scale(name, normalization):
    model, layer = quantized(name, 3, normalization=normalization)
    index = {}
    before = layer.weight.std().item()
    for _ in training(model, layer, OscillationSettings(momentum=0.2, freeze_threshold=0.4, start=0.0)):
        tracker = layer.oscillation
        found = layer.weight_quantizer.encode(layer.normalized_weight()[0].detach())
        for i in tracker.frozen.flatten().nonzero().flatten().tolist():
            assert index.setdefault(i, tracker.index.flatten()[i].item()) == found.flatten()[i].item()
    assert index
    # A third of the weights is frozen in the end. Without restoring the deviation, what they add to it would grow or
    # shrink with every step; decay and training alone move it by less than half.
    assert 0.5 < layer.weight.std().item() / before < 1.5


def test_holding_normalized_weights_changes_neither_mean_nor_deviation():
    model, layer = quantized("lcq", 3, normalization="lwn")
    oscillations = Oscillations(model, OscillationSettings(freeze_threshold=0.5, start=0.0))
    layer.oscillation.frozen[:, 0] = True
    mean, deviation = layer.weight.mean(), layer.weight.std()
    for _ in range(20):
        oscillations.after_step_(1.0)
    torch.testing.assert_close(layer.weight.mean(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.weight.std(), deviation, rtol=1e-5, atol=0)
    # Repeated, the free weights make room and the frozen ones come to lie on their levels.
    held = layer.normalized_weight()[0][:, 0]
    level = layer.weight_quantizer.decode(layer.oscillation.index.long())[:, 0]
    torch.testing.assert_close(held, level, rtol=1e-4, atol=1e-4)


def test_without_frozen_weights_nothing_is_written_to_the_weights():
    for name, normalization in [("lsq", "none"), *NORMALIZED]:
        model, layer = quantized(name, 3, normalization=normalization)
        before = layer.weight.clone()
        Oscillations(model, OscillationSettings(freeze_threshold=0.5, start=0.0)).after_step_(1.0)
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["lsq", "nulsq"])
def test_a_weight_whose_optimum_lies_between_levels_oscillates_until_dampened_or_frozen(name):
    """The paper's toy problem: the gradient's sign depends on the side of the threshold, so the weight hops over it."""
    found = {}
    for what, settings in (("nothing", {"track": True}), ("dampened", {"dampening": 5.0, "aggregate": "sum"}),
                           ("frozen", {"freeze_threshold": 0.3})):
        model, layer = quantized(name, 3)
        layer.weight_quantizer.requires_grad_(False)
        runs = training(model, layer, OscillationSettings(momentum=0.1, start=0.0, **settings), steps=80, lr=0.05)
        *_, oscillations = runs
        found[what] = oscillations.count()["0"]
        assert oscillating_fraction(oscillations.count())["frozen_share"] == found[what]["frozen"] / 108
    assert found["nothing"]["oscillating"] > 20 and found["nothing"]["frozen"] == 0
    assert found["dampened"]["oscillating"] == 0 < found["frozen"]["frozen"]
    assert found["frozen"]["oscillating"] < found["nothing"]["oscillating"] / 2


# ---- dampening


@pytest.mark.parametrize(("name", "bits", "per_channel"), GRIDS)
@pytest.mark.parametrize(("aggregate", "share"), [("kernel_mean", 1 / 27), ("sum", 1.0), ("mean", 1 / 108)])
def test_dampening_gradient_is_the_formulas(name, bits, per_channel, aggregate, share):
    model, layer = quantized(name, bits, per_channel)
    to_float64(model)
    oscillations = Oscillations(model, OscillationSettings(dampening=0.3, aggregate=aggregate, start=0.5))
    quantizer, weight = layer.weight_quantizer, layer.weight
    assert oscillations.dampening(0.49) is None and oscillations.dampening(0.5) is None
    factor = 0.3 * (1 - math.cos(math.pi * (0.8 - 0.5) / 0.5)) / 2
    oscillations.dampening(0.8).backward()

    level, levels = quantizer(weight).detach(), quantizer.levels()
    low, high = (end.view(-1, 1, 1, 1) for end in (levels[..., 0], levels[..., -1]))
    inside = (weight >= low) & (weight <= high)
    assert inside.any() and not inside.all()
    wanted = torch.where(inside, -2 * factor * share * (level - weight), 0)
    torch.testing.assert_close(weight.grad, wanted.detach(), rtol=1e-12, atol=1e-14)
    assert all(parameter.grad is None for parameter in quantizer.parameters())


@pytest.mark.parametrize(("name", "normalization"), NORMALIZED)
def test_dampening_goes_through_the_normalization(name, normalization):
    """Central differences in float64, away from thresholds: there Q is constant and the loss smooth."""
    model, layer = quantized(name, 3, normalization=normalization)
    to_float64(model)
    loss = dampening_loss(layer)
    loss.backward()
    for i in range(0, 108, 9):
        values, step = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                layer.weight.view(-1)[i] += sign * step
                values.append(dampening_loss(layer).item())
                layer.weight.view(-1)[i] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert layer.weight.grad.view(-1)[i].item() == pytest.approx(difference, rel=1e-4, abs=1e-8)


def test_dampening_beside_a_compiled_network_equals_eager():
    gradients = []
    for compiled in (False, True):
        model, layer = quantized("nulsq", 2)
        oscillations = Oscillations(model, OscillationSettings(dampening=0.3, freeze_threshold=0.5, start=0.0))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        (run(x).square().mean() + oscillations.dampening(0.5)).backward()
        oscillations.after_step_(0.5)
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(nulsq.available()))
def test_following_a_step_and_dampening_synchronize_nothing(name):
    """On the meta device there are no values: whatever waits for one raises."""
    model, layer = quantized(name, 3, normalization=nulsq.get_quantizer(name).normalization)
    model.to("meta")
    oscillations = Oscillations(model, OscillationSettings(dampening=0.1, freeze_threshold=0.5, start=0.0))
    oscillations.dampening(1.0).backward()
    oscillations.after_step_(1.0)
    with pytest.raises(RuntimeError):
        layer.weight.sum().item()


# ---- schedules, state, settings


def test_the_threshold_falls_and_dampening_rises_by_half_a_cosine():
    model, _ = quantized("lsq", 2)
    found = Oscillations(model, OscillationSettings(freeze_threshold=0.1, freeze_final=0.02, start=0.25))
    assert found.threshold(0.2499) is None
    values = [found.threshold(done) for done in (0.25, 0.625, 1.0)]
    assert values == pytest.approx([0.1, 0.06, 0.02])
    constant = Oscillations(model, OscillationSettings(freeze_threshold=0.1))
    assert {constant.threshold(done) for done in (0.25, 0.6, 1.0)} == {0.1}
    assert Oscillations(model, OscillationSettings(track=True)).threshold(1.0) is None


def test_tracking_continues_from_a_state_dict_bit_for_bit():
    settings = OscillationSettings(momentum=0.2, freeze_threshold=0.4, start=0.0)
    model, layer = quantized("nulsq", 2)
    *_, going_on = training(model, layer, settings, steps=15)
    other, taken = quantized("nulsq", 2, seed=5)
    resumed = Oscillations(other, settings)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for oscillations, weight in ((going_on, layer.weight), (resumed, taken.weight)):
        for step in range(10):
            with torch.no_grad():
                weight.add_(0.5 * torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(step)))
            oscillations.after_step_(1.0)
    for (key, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_only_layers_of_few_bits_are_tracked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.Linear(8, 2))
    nulsq.quantize_(model, nulsq.Policy(bits=3))  # first and last 8 bits
    assert list(Oscillations(model, OscillationSettings(track=True)).layers) == ["2"]
    assert list(Oscillations(model, OscillationSettings(track=True, max_bits=8)).layers) == ["0", "2", "3"]
    with pytest.raises(ValueError, match="no layer has a weight quantizer of at most oscillation.max_bits = 2"):
        Oscillations(model, OscillationSettings(track=True, max_bits=2))


@pytest.mark.parametrize(("settings", "message"), [
    ({"oscillation.freeze_threshold": 0.015}, "freeze_threshold = 0.015, allowed: at least 2 osc.*momentum = 0.02"),
    ({"oscillation.freeze_threshold": 0.1, "oscillation.freeze_final": 0.01}, "freeze_final = 0.01, allowed: at least"),
    ({"oscillation.freeze_final": 0.1}, "freeze_final = 0.1 needs oscillation.freeze_threshold"),
    ({"oscillation.freeze_threshold": 0.1, "oscillation.freeze_final": 0.2}, "allowed: at most"),
    ({"oscillation.start": 1.0}, "oscillation.start = 1.0, allowed: at least 0 and at most 0.999"),
    ({"oscillation.track": True, "oscillation.max_bits": 1}, "no layer has a weight quantizer of at most"),
    ({"oscillation.aggregate": "kernel"}, "oscillation.aggregate"),
    ({"optim.freeze_bn": True, "optim.reestimate_bn": 3}, "set one of the two"),
])
def test_settings_that_do_not_fit_write_nothing(digits, tmp_path, settings, message):
    from nulsq.train import train
    with pytest.raises(InputError, match=message):
        own = {"name": "x", "run.root": str(tmp_path / "runs"), "data.path": str(digits)}
        train(load(Recipe, None, own | settings), quiet=True)
    assert not (tmp_path / "runs").exists()


def test_re_estimation_needs_batch_norms(short, tmp_path):
    from nulsq.train import train
    recipe = short("x", run__root=str(tmp_path / "runs"), model__name="timm:vit_tiny_patch16_224",
                   optim__reestimate_bn=2)
    with pytest.raises(InputError, match="optim.reestimate_bn = 2: timm:vit_tiny_patch16_224 has no batch norm"):
        train(recipe, quiet=True)
    assert not (tmp_path / "runs").exists()


# ---- batch norm


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5),
                          nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 2))
    batches = [torch.randn(6, 3, 8, 8) + i for i in range(3)]
    nulsq.calibrate_(nulsq.quantize_(model, nulsq.Policy(bits=3)), batches)
    return model, batches


def test_re_estimated_statistics_are_the_plain_average_over_the_batches():
    model, batches = normed()
    reestimate_batch_norm_(model, batches)
    conv, norm = model[0], model[1]
    # The first norm sees the quantized convolution; per batch: mean, and variance with n - 1.
    seen = [conv(x).transpose(0, 1).flatten(1) for x in batches]
    torch.testing.assert_close(norm.running_mean, sum(x.mean(1) for x in seen) / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, sum(x.var(1) for x in seen) / 3, rtol=1e-5, atol=1e-6)


def test_re_estimation_changes_nothing_else_and_forgets_what_was_there():
    model, batches = normed()
    model.train()
    freeze_batch_norm_(model)
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    reestimate_batch_norm_(model, batches)
    once = copy.deepcopy(model.state_dict())
    assert [module.training for module in model.modules()] == modes and model[1].momentum == 0.3
    assert {key for key in before if not torch.equal(before[key], once[key])} == {
        f"{i}.{what}" for i in (1, 5) for what in ("running_mean", "running_var")}
    model[1].running_mean.fill_(torch.nan)
    reestimate_batch_norm_(model, batches)
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="there is no batch"):
        reestimate_batch_norm_(model, [])
