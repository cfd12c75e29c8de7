"""Layers as networks use them: shared, hooked, subclassed, reparametrized, wrapped, never called."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import nulsq
from nulsq import LayerRule, Policy, SideRule
from nulsq.quant.layers import QuantizedLayer, quantize_layer_, reason_not_quantizable

EVERYWHERE = Policy(bits=3, rules={})


def images(count=4, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def quantized(model, policy=EVERYWHERE):
    torch.manual_seed(0)
    nulsq.quantize_(model, policy)
    return nulsq.calibrate_(model, [images()])


class Standardized(nn.Conv2d):
    """As timm's StdConv2dSame: pads by itself and normalizes its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, self.bias)


class TwoProducts(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight)


# ---- shared layers and weights


@pytest.mark.parametrize("share", ["attribute", "sequential", "module_dict"])
def test_layer_under_several_names_is_one_quantized_layer(share):
    conv = nn.Conv2d(3, 3, 3, padding=1)
    containers = {"attribute": nn.Sequential(), "sequential": nn.Sequential(conv, nn.ReLU(), conv),
                  "module_dict": nn.ModuleDict({"a": conv, "b": conv})}
    model = containers[share]
    if share == "attribute":
        model.first, model.second = conv, conv
    nulsq.quantize_(model, EVERYWHERE)
    assert isinstance(conv, QuantizedLayer)
    assert all(child is conv for child in model.children() if not isinstance(child, nn.ReLU))


def test_layers_that_share_a_weight_share_its_quantizer():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    nulsq.quantize_(nn.Sequential(first, nn.ReLU(), second), EVERYWHERE)
    assert first.weight_quantizer is second.weight_quantizer
    assert first.activation_quantizer is not second.activation_quantizer


def test_different_settings_for_a_shared_weight_are_refused_by_name():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    policy = Policy(bits=3, rules={"second": LayerRule(["1"], bits=8)})
    with pytest.raises(ValueError, match="0 and 1 share one weight, but their weight settings differ"):
        nulsq.quantize_(nn.Sequential(first, second), policy)


# ---- what is attached to a layer


def test_hooks_attributes_and_overridden_forward_are_kept():
    conv = nn.Conv2d(3, 3, 3)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append("forward"))
    conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    conv.register_full_backward_hook(lambda *_: calls.append("backward"))
    conv.register_state_dict_post_hook(lambda *_: calls.append("state"))
    conv.note = "mine"
    original = conv.forward
    conv.forward = lambda x: 2 * original(x)
    model = nn.Sequential(conv)
    expected = model(images())
    quantized(model, Policy(bits=8, rules={}))
    calls.clear()
    y = model(images())
    y.sum().backward()
    model.state_dict()
    assert sorted(calls) == ["backward", "forward", "pre", "state"] and conv.note == "mine"
    assert not torch.equal(y, expected)  # quantized,
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)  # and still doubled by the overridden forward


# ---- subclasses


def test_subclass_with_its_own_forward_quantizes_the_operands_of_its_product():
    layer = Standardized(3, 4, 3)
    model = quantized(nn.Sequential(layer), Policy(bits=4, rules={}, weight=SideRule("lsq", per_channel=True)))
    x = images(seed=1)
    weight = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)
    expected = F.conv2d(layer.activation_quantizer(F.pad(x, (1, 1, 1, 1))), layer.weight_quantizer(weight), layer.bias)
    assert torch.equal(model(x), expected)
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer(weight))
    model(x).sum().backward()
    assert layer.weight.grad.any() and layer.weight_quantizer.step.grad.any()


def test_subclass_with_two_products_stays_float_and_is_named():
    model = nn.Sequential(nn.Linear(4, 4), TwoProducts(4, 4))
    with pytest.warns(UserWarning, match=r"not quantized: 1 \(TwoProducts: its forward does not call exactly one"):
        nulsq.quantize_(model, EVERYWHERE)
    assert type(model[1]) is TwoProducts and "TwoProducts (its forward" in nulsq.summary(model)


def test_uninitialized_layer_stays_float_and_is_named():
    with pytest.warns(UserWarning, match="run one batch through the model first"):
        nulsq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), EVERYWHERE)


def test_one_dimensional_convolution_is_quantized():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    nulsq.quantize_(model, EVERYWHERE)
    nulsq.calibrate_(model, [images()[:, :, 0]])
    assert type(model[0]).__name__ == "QuantConv1d" and model(images()[:, :, 0]).shape == (4, 2)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3), lambda: Standardized(3, 4, 3)])
def test_quantized_layers_are_copied_and_pickled(make):
    model = quantized(nn.Sequential(make()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(model[0]) and twin[0].weight is not model[0].weight
        assert torch.equal(twin(images(seed=1)), model(images(seed=1)))


# ---- reparametrized weights


REPARAMETRIZATIONS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrization": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", REPARAMETRIZATIONS)
def test_reparametrized_weight_is_quantized_and_learns(name, when):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    if when == "before":
        REPARAMETRIZATIONS[name](model[0])
    nulsq.quantize_(model, EVERYWHERE)
    if when == "after":
        REPARAMETRIZATIONS[name](model[0])
    nulsq.calibrate_(model, [images()])
    model(images(seed=1)).square().sum().backward()
    conv = model[0]
    assert torch.isin(conv.quantized_weight(), conv.weight_quantizer.levels()).all()
    learned = [p for key, p in conv.named_parameters(recurse=False) if key != "bias"] or [
        p for key, p in conv.named_parameters() if "parametrizations" in key]
    assert learned and all(p.grad is not None and p.grad.isfinite().all() for p in learned)


# ---- layers that are not called as layers


class WeightOnly(nn.Module):
    """As EVA and SwinV2: uses the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.linear(self.stem(x).relu(), self.qkv.weight))


@pytest.mark.parametrize("preset", ["paper", "none", "weights_only"])
@pytest.mark.parametrize("protocol", ["float", "reference"])
def test_layer_that_is_never_called_is_refused_by_name(preset, protocol):
    model = nulsq.quantize_(WeightOnly(), Policy(preset=preset))
    with pytest.raises(ValueError, match="the network never calls qkv. If it uses their weights"):
        nulsq.calibrate_(model, [torch.randn(4, 8)], protocol)


class Auxiliary(nn.Module):
    """As googlenet: a head that runs in training only, after a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head, self.auxiliary = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2),
                                                           nn.Linear(4, 2))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def test_layer_that_runs_in_training_only_is_calibrated_there():
    torch.manual_seed(0)
    model = Auxiliary()
    model.norm.running_mean.fill_(0.1)  # as after training
    before = {key: value.clone() for key, value in model.norm.state_dict().items()}
    state = torch.get_rng_state()
    nulsq.calibrate_(nulsq.quantize_(model, EVERYWHERE), [images(), images(seed=1)])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.norm.state_dict().items())
    assert all(quantizer.calibrated for quantizer in nulsq.quantizers_of(model))
    assert len(model.train()(images())) == 2


def test_torchs_fused_transformer_is_not_used_with_quantized_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the attention's output layer stays float
        nulsq.quantize_(model, EVERYWHERE)
    nulsq.calibrate_(model, [x])
    calls = []
    model.layers[1].linear1.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert calls


# ---- wrapped models


class OptimizedModule(nn.Module):
    """Stands for what torch.compile returns."""


@pytest.mark.parametrize(("wrap", "message"), [
    (nn.DataParallel, "the model is wrapped in DataParallel"),
    (lambda model: torch.compile(model, backend="eager"), "the model is compiled"),
    (lambda model: nn.Sequential(OptimizedModule(), model), "0 is compiled"),
    (lambda model: (model.compile(backend="eager"), model)[1], "the model is compiled")])
def test_wrapped_and_compiled_models_are_refused_with_the_right_order(wrap, message):
    with pytest.raises(ValueError, match=f"{message}.*The order is: build the float model"):
        nulsq.quantize_(wrap(nn.Sequential(nn.Linear(4, 4))))


def test_model_that_is_one_layer_is_quantized():
    layer = nn.Linear(4, 4)
    assert nulsq.quantize_(layer, EVERYWHERE) is layer and isinstance(layer, QuantizedLayer)


def test_a_layer_alone_can_be_quantized():
    layer = nn.Linear(4, 4)
    assert reason_not_quantizable(layer) is None
    quantizer = nulsq.get_quantizer("lsq")(4, "weight")
    quantizer.reset_(nulsq.Statistics.of(layer.weight))
    y = quantize_layer_(layer, quantizer, None)(torch.randn(2, 4))
    assert y.shape == (2, 4) and layer.normalization == "none"


# ---- batches and optimizers


@pytest.mark.parametrize("batches", [
    [images()], [(images(), torch.zeros(4))], [{"image": images()}], [{"pixel_values": images(), "labels": [0]}],
    torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(), torch.zeros(4)), batch_size=4)])
def test_calibration_and_batch_norm_take_the_same_batches(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    nulsq.calibrate_(nulsq.quantize_(model, EVERYWHERE), batches)
    nulsq.reestimate_batch_norm_(model, batches)
    expected = model[0](images()).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batches", "message"), [
    (images(), r"batches is one tensor of shape \(4, 3, 8, 8\): give a list of batches"),
    (["a.png"], "batch 0 is a str, allowed: an image tensor"),
    ([{"x": images()}], "batch 0 is a dict with the keys x, allowed: .* mapping with image")])
def test_other_batches_are_refused(batches, message):
    model = nulsq.quantize_(nn.Sequential(nn.Conv2d(3, 4, 3)), EVERYWHERE)
    for function in (nulsq.calibrate_, nulsq.reestimate_batch_norm_):
        with pytest.raises(ValueError, match=message):
            function(model, batches)


def test_follow_step_needs_every_learned_step_in_an_optimizer():
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)))
    steps = [p for quantizer in nulsq.quantizers_of(model) for p in quantizer.parameters()]
    others = [p for p in model.parameters() if not any(p is step for step in steps)]
    of_weights, of_steps = torch.optim.SGD(others, lr=0.1), torch.optim.SGD(steps, lr=0.1)
    for arguments in ((model, of_weights, of_steps), (of_steps, model), (of_weights, model, of_steps)):
        nulsq.follow_step_(*arguments).remove()
    for arguments in ((model, of_weights), (of_weights, model)):
        with pytest.raises(ValueError, match="no optimizer has 0.weight_quantizer.step"):
            nulsq.follow_step_(*arguments)
    with pytest.raises(ValueError, match="the model has no quantizers"):
        nulsq.follow_step_(nn.Linear(2, 2), of_weights)
    with pytest.raises(ValueError, match="takes a model and its optimizers, not"):
        nulsq.follow_step_(model)
