"""dequantize_: the float model again, whatever was done to the quantized one."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import nulsq
from nulsq import Oscillations, OscillationSettings, Policy, SideRule
from nulsq.quant.fold import AbsorbedBatchNorm2d, AbsorbedReLU, fold_

EVERYWHERE = Policy(bits=3, rules={})


def images(count=4, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
                          nn.Linear(64, 2))
    model(images())
    return model.eval()


def quantized(model, policy=EVERYWHERE):
    return nulsq.calibrate_(nulsq.quantize_(model, policy), [images()])


@torch.no_grad()
def test_the_float_model_is_back():
    model = network()
    types, keys, expected = [type(module) for module in model.modules()], list(model.state_dict()), model(images())
    parameters = list(model.parameters())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model[3].note = "kept"
    quantized(model)
    assert not torch.equal(model(images()), expected)
    assert nulsq.dequantize_(model) is model
    seen.clear()
    assert torch.equal(model(images()), expected) and seen == [1] and model[3].note == "kept"
    assert [type(module) for module in model.modules()] == types and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not hasattr(model, "quantized_share")
    quantized(model)  # and once more


@torch.no_grad()
def test_a_folded_model_gets_its_batch_norms_and_relus_back():
    model = network()
    expected = model(images())
    assert fold_(quantized(model))
    nulsq.dequantize_(model)
    assert torch.equal(model(images()), expected)
    assert not any(isinstance(module, AbsorbedBatchNorm2d | AbsorbedReLU) for module in model.modules())


@pytest.mark.parametrize(("method", "normalization"), [("lsq", None), ("nulsq", None), ("lcq", "lwn"), ("apot", "wn")])
@torch.no_grad()
def test_rounded_weights_are_those_of_the_quantized_network(method, normalization):
    model = quantized(network(), Policy(bits=3, rules={}, weight=SideRule(method, normalization=normalization),
                                        activation=SideRule("fp")))
    expected = model(images())
    nulsq.dequantize_(model, round_weights=True)
    torch.testing.assert_close(model(images()), expected)
    assert len(model[3].weight.unique()) <= 8


@torch.no_grad()
def test_an_overridden_forward_is_back():
    model = network()
    model[3].forward = lambda x: nn.Conv2d.forward(model[3], 2 * x)
    expected = model(images())
    quantized(model)
    nulsq.dequantize_(model)
    assert torch.equal(model(images()), expected) and "forward" in model[3].__dict__


def test_trackers_of_oscillating_weights_are_removed():
    model = quantized(network())
    Oscillations(model, OscillationSettings(track=True))
    nulsq.dequantize_(model)
    assert not any("oscillation" in key for key in model.state_dict())


@torch.no_grad()
def test_what_cannot_be_done_is_refused_by_name_and_changes_nothing():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    def refuse(model, message, **options):
        before = model(images())
        with pytest.raises(ValueError, match=message):
            nulsq.dequantize_(model, **options)
        assert torch.equal(model(images()), before)

    torch.manual_seed(0)
    refuse(quantized(nn.Sequential(Standardized(3, 4, 3))), r"0 \(QuantStandardized\) transforms", round_weights=True)
    refuse(quantized(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))).eval(), "weight of 0 is computed",
           round_weights=True)
    later = quantized(network())
    parametrizations.weight_norm(later[3])
    refuse(later, "3 was reparametrized")
    with pytest.raises(ValueError, match="compiled"):
        nulsq.dequantize_(torch.compile(quantized(network())))


def test_little_that_is_quantized_is_a_warning_and_in_the_summary():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 2))
    nulsq.quantize_(model, EVERYWHERE)
    of_convolution, of_transposed, of_linear = 36 * 4 * 27, 36 * 4 * 4 * 9, 256 * 2
    share = 100 * (1 - of_transposed / (of_convolution + of_transposed + of_linear))
    text = f"quantized: {share:.1f} % of the multiply-adds; float: products outside of layers {100 - share:.1f} %"
    with pytest.warns(UserWarning, match=text):
        nulsq.calibrate_(model, [images()])
    assert text in nulsq.summary(model)


def test_share_of_weights_alone():
    model = nulsq.quantize_(network(), Policy(bits=3, preset="weights_only"))
    nulsq.calibrate_(model, [images()])
    assert "quantized: weight of 100.0 % of the multiply-adds" in nulsq.summary(model)
