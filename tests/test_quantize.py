"""quantize_, policies, calibration and the step hook on small networks."""

import copy

import pytest
import torch
from torch import nn

import nulsq
from nulsq.quant.calibration.initial_step import HALF_NORMAL_STEP, NORMAL_STEP
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.settings import LayerRule, Policy, SideRule


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, bias=False),
                         nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def images(count=16, seed=0):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def trained_batch_norm(model):
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(images(seed=seed))
    return model.eval()


def test_layers_keep_their_parameters_and_keys():
    model = network()
    before = dict(model.named_parameters())
    nulsq.quantize_(model)
    after = dict(model.named_parameters())
    assert all(after[key] is value for key, value in before.items())
    assert {type(model[i]).__name__ for i in (0, 3, 8)} == {"QuantConv2d", "QuantLinear"}


def test_default_policy_is_the_papers():
    model = nulsq.quantize_(network())
    kinds = [(layer.weight_quantizer.name(), layer.weight_quantizer.bits, layer.activation_quantizer.name(),
              layer.activation_quantizer.bits) for layer in (model[0], model[3], model[8])]
    assert kinds == [("minmax", 8, "minmax", 8), ("lsq", 2, "nulsq", 2), ("minmax", 8, "minmax", 8)]


def test_float_on_both_sides_leaves_the_layer_alone():
    policy = Policy(rules={"conv": LayerRule(["3"], quantizer="fp")})
    model = nulsq.quantize_(network(), policy)
    assert type(model[3]) is nn.Conv2d and type(model[0]).__name__ == "QuantConv2d"


def test_first_matching_rule_wins_and_sides_win_over_rules():
    rules = {"a": LayerRule(["3"], bits=3, weight=SideRule(bits=4, per_channel=True)), "b": LayerRule(["*"], bits=8)}
    model = nulsq.quantize_(network(), Policy(rules=rules))
    assert (model[3].weight_quantizer.bits, model[3].activation_quantizer.bits) == (4, 3)
    assert model[3].weight_quantizer.channels == 8
    assert model[0].weight_quantizer.bits == 8


@pytest.mark.parametrize(("policy", "message"), [
    (Policy(rules={"x": LayerRule(["features.*"])}), r"rules.x.match: 'features.\*' matches no layer"),
    (Policy(rules={"x": LayerRule(["role:frist"])}), "no role 'role:frist', allowed: role:first, role:last"),
    (Policy(weight=SideRule(quantizer="lsqq")), "Did you mean 'lsq'"),
    (Policy(bits=1), "lsq: bits = 1, allowed for weights: 2 to 8"),
    (Policy(activation=SideRule(quantizer="nulsq", per_channel=True)), "per-channel steps are defined for weights"),
    (Policy(weight=SideRule(quantizer="lsq", options={"colour": 3})), "has no such option"),
    (Policy(weight=SideRule(quantizer="lsq", signed=False)), "signed = False, allowed for weights: True"),
    (Policy(weight=SideRule(quantizer="lsq", init="best")), "init = .best., allowed: mse, nmse, lsq, const"),
])
def test_what_does_not_fit_is_an_error_and_leaves_the_model_alone(policy, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        nulsq.quantize_(model, policy)
    assert not nulsq.quantizers_of(model) and type(model[0]) is nn.Conv2d


def test_quantizing_twice_is_an_error():
    with pytest.raises(ValueError, match="quantized already"):
        nulsq.quantize_(nulsq.quantize_(network()))


def test_calibration_leaves_trained_batch_norm_alone_and_settles_every_quantizer():
    model = nulsq.quantize_(trained_batch_norm(network()))
    before = copy.deepcopy({k: v for k, v in model.state_dict().items() if "running" in k or "tracked" in k})
    nulsq.calibrate_(model, [images(), images(seed=1)])
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(quantizer.calibrated for quantizer in nulsq.quantizers_of(model))
    assert model[0].activation_quantizer.signed and not model[3].activation_quantizer.signed
    assert not model.training


def test_calibration_measures_the_float_network():
    model = trained_batch_norm(network())
    seen = []
    handle = model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images())
    handle.remove()
    nmse = Policy(weight=SideRule("lsq", init="nmse"), activation=SideRule("nulsq", init="nmse"))
    nulsq.calibrate_(nulsq.quantize_(model, nmse), [images()])
    wanted = (2 * seen[0].square().mean()).sqrt() * HALF_NORMAL_STEP[3]
    torch.testing.assert_close(model[3].activation_quantizer.steps.detach(), wanted.expand(3))
    wanted = model[3].weight.std() * NORMAL_STEP[1]
    torch.testing.assert_close(model[3].weight_quantizer.step.detach()[0], wanted.detach())


def test_calibration_of_batches_equals_that_of_their_union():
    halves, whole = (nulsq.quantize_(trained_batch_norm(network())) for _ in range(2))
    x = images(32)
    nulsq.calibrate_(halves, x.split(8))
    nulsq.calibrate_(whole, [x])
    for a, b in zip(halves.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # convolutions of other batch sizes round otherwise


def test_fresh_batch_norms_get_statistics_first():
    model = nulsq.quantize_(network())
    nulsq.calibrate_(model, [images()])
    assert model[1].running_var.sub(1).abs().max() > 0.1
    assert all(quantizer.calibrated for quantizer in nulsq.quantizers_of(model))


def test_calibration_without_batches_or_with_nan_says_so():
    with pytest.raises(ValueError, match="at least one batch"):
        nulsq.calibrate_(nulsq.quantize_(trained_batch_norm(network())), [])
    x = images()
    x[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        nulsq.calibrate_(nulsq.quantize_(trained_batch_norm(network())), [x])


def test_a_refused_calibration_leaves_batch_norm_as_it_was():
    model = nulsq.quantize_(network())  # batch norms that never saw data
    bad = images()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        nulsq.calibrate_(model, [bad])
    assert not model[1].running_mean.any() and model[1].momentum == 0.1
    nulsq.calibrate_(model, [images()])
    assert all(quantizer.calibrated for quantizer in nulsq.quantizers_of(model))


@pytest.mark.parametrize("name", nulsq.available())
def test_a_second_calibration_decides_the_sign_anew(name):
    quantizer = nulsq.get_quantizer(name)(3, "activation")
    x = images()
    for data, signed in ((x.abs(), False), (x, True), (x.abs(), False)):
        quantizer.reset_(Statistics.of(data))
        assert quantizer.signed is signed
    asked = nulsq.get_quantizer(name)(3, "activation", signed=False)
    asked.reset_(Statistics.of(x))
    assert asked.signed is False


def test_one_bit_is_refused_for_negative_values_every_time():
    quantizer = nulsq.get_quantizer("apot")(1, "activation")
    for _ in range(2):
        with pytest.raises(ValueError, match="needs at least 2 bits"):
            quantizer.reset_(Statistics.of(images()))


def test_channels_of_the_gradient_scale_are_the_layers():
    """Of [B, T, C] tokens and [B, H, W, C] maps a linear layer's channels are the last dimension."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 5))
    side = SideRule(quantizer="lsq", grad_scale="channels")
    nulsq.quantize_(model, Policy(weight=side, activation=side, rules={}))
    assert model[0].activation_quantizer._elements(torch.zeros(2, 3, 12, 12)) == 3
    assert model[1].activation_quantizer._elements(torch.zeros(2, 7, 8)) == 8
    assert model[1].activation_quantizer._elements(torch.zeros(2, 6, 6, 8)) == 8


def test_unsigned_quantizer_on_negative_input_warns():
    model = nulsq.quantize_(trained_batch_norm(network()),
                            Policy(activation=SideRule(quantizer="nulsq", signed=False), rules={}))
    with pytest.warns(UserWarning, match="is unsigned: everything below zero becomes zero"):
        nulsq.calibrate_(model, [images()])


def test_steps_stay_positive_in_training():
    model = nulsq.calibrate_(nulsq.quantize_(network()), [images()]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)  # throws every step size across zero
    nulsq.follow_step_(optimizer, model)
    model(images()).square().sum().backward()
    optimizer.step()
    for quantizer in nulsq.quantizers_of(model):
        for parameter in quantizer.parameters():
            assert (parameter > 0).all()


def test_statistics_merge_into_those_of_the_union():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    merged = Statistics.of(x[:300]).merge(Statistics.of(x[300:]))
    whole = Statistics.of(x)
    for name in ("mean_absolute", "mean_square", "std", "largest"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.std, x.double().std())


def test_summary_lists_every_layer():
    text = nulsq.summary(nulsq.calibrate_(nulsq.quantize_(network()), [images()]))
    assert "minmax 8b signed" in text and "nulsq 2b unsigned" in text and text.count("Quant") == 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nmse_constants_are_optimal(bits):
    """Re-derive both tables on a fine grid of the normal density; the published digits are good to 1e-4."""
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)

    def error(step, quantize):
        return float((density * (x - quantize(x, step)).square()).sum())

    def best(start, quantize):
        low, high = 0.8 * start, 1.2 * start
        for _ in range(60):  # golden section
            a, b = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
            low, high = (low, b) if error(a, quantize) < error(b, quantize) else (a, high)
        return (low + high) / 2

    half = 2 ** (bits - 1)
    mid_rise = NORMAL_STEP[half - 1]
    found = best(mid_rise, lambda x, s: ((x / s).floor().clamp(-half, half - 1) + 0.5) * s)
    assert found == pytest.approx(mid_rise, abs=1e-4)

    x = x[x >= 0]
    density = torch.exp(-x.square() / 2)
    levels = 2**bits - 1
    # max(0, z) has E[x^2] = 1/2, so its factor sqrt(2 E[x^2]) is 1; zeros have no error whatever the step
    found = best(HALF_NORMAL_STEP[levels], lambda x, s: (x / s).round().clamp(0, levels) * s)
    assert found == pytest.approx(HALF_NORMAL_STEP[levels], abs=1e-4)


def test_a_rule_whose_layers_are_taken_says_so():
    rules = Policy().rules | {"stem": LayerRule(["role:first"], quantizer="lsq", bits=4)}
    with pytest.raises(ValueError, match="quant.rules.stem changes nothing: earlier rules match all its layers: edges"):
        nulsq.quantize_(network(), Policy(rules=rules))


def test_trained_batch_norm_without_a_counter_of_batches_is_left_alone():
    model = trained_batch_norm(network())
    model[1].num_batches_tracked.zero_()
    before = model[1].running_var.clone()
    nulsq.calibrate_(nulsq.quantize_(model), [images(seed=5)])
    assert torch.equal(model[1].running_var, before)


def test_the_references_protocol_keeps_the_larger_of_the_batches():
    policy = Policy(rules={"edges": LayerRule(["role:first"], quantizer="minmax", bits=8,
                                              activation=SideRule(options={"range": "static"}))})
    model = nulsq.quantize_(trained_batch_norm(network()), policy)
    large, small = images() * 3, images(seed=1)
    nulsq.calibrate_(model, [large, small], protocol="reference")
    assert float(model[0].activation_quantizer.largest) == float(large.abs().max())


def test_batch_norms_that_do_more_keep_it_when_shared_over_ranks():
    timm = pytest.importorskip("timm")
    from nulsq.models.network import sync_batch_norm
    model = timm.create_model("efficientnet_lite0", num_classes=10)
    before = sum(type(module).__name__ == "BatchNormAct2d" for module in model.modules())
    kinds = {type(module).__name__ for module in sync_batch_norm(model).modules()}
    assert before and "SyncBatchNormAct" in kinds and "SyncBatchNorm" not in kinds


class OddNorm(nn.BatchNorm2d):
    pass


def test_a_batch_norm_that_nobody_knows_is_not_converted():
    from nulsq.errors import InputError
    from nulsq.models.network import sync_batch_norm
    with pytest.raises(InputError, match="OddNorm cannot be converted"):
        sync_batch_norm(nn.Sequential(OddNorm(3)))
