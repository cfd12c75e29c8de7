"""Batch norms and ReLUs folded into the quantizers that read them: same output, same gradients, and only where nobody
else reads it."""

import copy

import pytest
import torch
from torch import nn

import nulsq
import nulsq.quant.fold
from nulsq.models.libraries import build_model
from nulsq.quant.batch_norm import freeze_batch_norm_, reestimate_batch_norm_
from nulsq.quant.fold import AbsorbedBatchNorm2d, AbsorbedReLU, fold_
from nulsq.quant.op import FORMS, available, force

with_kernel = pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Residual(nn.Module):
    """One ReLU is read by two convolutions, one by a convolution and a sum, one is called twice."""

    def __init__(self, inplace=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.shared, self.summed, self.twice, self.single = (nn.ReLU(inplace) for _ in range(4))
        self.left, self.right, self.third, self.fourth, self.fifth = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.aside = nn.Identity()
        self.last = nn.Conv2d(8, 5, 3)

    def forward(self, x):
        x = self.shared(self.stem(x))
        x = self.summed(self.left(x) + self.right(self.aside(x)))
        x = self.twice(self.third(x) + x)
        x = self.twice(self.fourth(x))
        x = self.single(self.fifth(x))
        return self.last(x).mean((2, 3))


def quantized(model, size=12):
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    nulsq.quantize_(model, nulsq.Policy(preset="none"))
    nulsq.calibrate_(model, [images])
    return model, images


def outcome(model, images):
    model.zero_grad()
    y = model(images)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}, model.state_dict()


@pytest.fixture
def relu_alone(monkeypatch):
    """As on a machine without the kernel that a batch norm needs."""
    monkeypatch.setattr(nulsq.quant.fold, "available", lambda device: False)


def test_folds_where_quantized_layers_alone_read(relu_alone):
    model, _ = quantized(Residual())
    assert fold_(model) == ["shared", "single"]
    assert type(model.shared) is AbsorbedReLU and type(model.summed) is nn.ReLU
    assert {name for name, layer in model.named_children() if getattr(layer, "activation_quantizer", None) is not None
            and layer.activation_quantizer.relu} == {"left", "right", "last"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_without_relu_same_output_gradients_and_state_bit_for_bit(form, inplace, training, relu_alone):
    torch.manual_seed(0)
    model, images = quantized(Residual(inplace))
    folded = copy.deepcopy(model)
    assert fold_(folded)
    with force(form):
        wanted, found = outcome(model.train(training), images), outcome(folded.train(training), images)
    assert torch.equal(found[0], wanted[0])
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("name", "size", "relus", "norms"), [
    ("pytorchcv:preresnet20_cifar10", 32, 18, 18), ("timm:resnet18", 64, 11, 8), ("timm:regnetx_002", 64, 30, 0),
    ("torchvision:resnet18", 64, 0, 0), ("timm:deit_tiny_patch16_224", 224, 0, 0)])
def test_real_networks(name, size, relus, norms):
    torch.manual_seed(0)
    model, images = quantized(build_model(name, 10), size)
    wanted = outcome(model.eval(), images)
    modes = [module.training for module in model.modules()]
    folded = fold_(model)
    assert len(folded) == relus + (norms if available("cpu") else 0)
    assert [module.training for module in model.modules()] == modes
    found = outcome(model, images)
    assert found[2].keys() == wanted[2].keys()
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-3)  # in float32: see below for equality


# ---- batch norm


class Normed(nn.Module):
    """A batch norm read by two quantized layers, through one ReLU; one read by one, without; one that a sum reads."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.stem = nn.Conv2d(3, 19, 3, padding=1)
        self.forked, self.relu = nn.BatchNorm2d(19, momentum=momentum), nn.ReLU()
        self.left, self.right = nn.Conv2d(19, 8, 3, padding=1), nn.Conv2d(19, 8, 1)
        self.signed, self.middle = nn.BatchNorm2d(8, momentum=momentum), nn.Conv2d(8, 8, 3, padding=1)
        self.summed, self.last = nn.BatchNorm2d(8, momentum=momentum), nn.Conv2d(8, 5, 3)

    def forward(self, x):
        x = self.relu(self.forked(self.stem(x)))
        x = self.left(x) + self.right(x)
        x = self.summed(self.middle(self.signed(x))) + x
        return self.last(x).mean((2, 3))


def normed(momentum=0.1, memory=torch.contiguous_format, device="cpu"):
    torch.manual_seed(0)
    model = Normed(momentum).to(device, torch.float64, memory_format=memory)
    images = torch.randn(4, 3, 11, 11, dtype=torch.float64).to(device).contiguous(memory_format=memory)
    for norm in (model.forked, model.signed, model.summed):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    nulsq.quantize_(model, nulsq.Policy(preset="none", bits=3))
    return nulsq.calibrate_(model, [images]), images


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-11, atol=1e-11)
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-9, atol=1e-9, msg=key)


@with_kernel
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_same_output_gradients_and_state(form, training, momentum, memory, device):
    """In float64, where nothing lies so near a threshold that rounding decides; state: running statistics, too."""
    if device == "cuda" and form == "eager":
        pytest.skip("a form for the CPU")
    model, images = normed(momentum, memory, device)
    folded = copy.deepcopy(model)
    assert fold_(folded) == ["relu", "forked", "signed"]
    model.train(training), folded.train(training)
    for _ in range(2):  # a second batch: momentum None averages
        with force(form):
            assert_same(outcome(folded, images), outcome(model, images))
        images = images * 0.7


@with_kernel
def test_a_folded_network_is_copied_frozen_and_measured_anew_like_any_other():
    model, images = normed()
    folded = copy.deepcopy(model)
    fold_(folded)
    twin = copy.deepcopy(folded.train())
    outcome(twin, images)
    assert int(twin.forked.num_batches_tracked) == int(folded.forked.num_batches_tracked) + 1  # its own batch norms
    for each in (model, folded):
        freeze_batch_norm_(each.train())
    assert_same(outcome(folded, images), outcome(model, images))
    for each in (model, folded):
        reestimate_batch_norm_(each, [images, images * 2])
    assert_same(outcome(folded, images), outcome(model, images))
    unfolded, _ = normed()
    unfolded.load_state_dict(folded.state_dict())
    assert_same(outcome(folded.eval(), images), outcome(unfolded.eval(), images))


@with_kernel
def test_a_batch_norm_that_cannot_be_folded_stays():
    class Odd(nn.BatchNorm2d):
        pass

    for norm in (Odd(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)):
        model, images = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3)))
        assert "1" not in fold_(model) and model[1] is norm
        model(images)
    model, _ = normed()
    fold_(model)
    assert type(model.summed) is nn.BatchNorm2d and type(model.forked) is AbsorbedBatchNorm2d
    assert not any("batch_norm" in name for name in model.state_dict())


@with_kernel
def test_an_observer_after_a_folded_batch_norm_sees_what_it_gave():
    model, images = normed()
    seen = []
    for each in (model.eval(), copy.deepcopy(model)):
        fold_(each) if seen else None
        each.left.observer = lambda activation, weight: seen.append(activation)
        each(images)
    torch.testing.assert_close(*seen)


@with_kernel
def test_one_element_of_each_channel_is_no_batch():
    norm = nn.BatchNorm2d(3)
    model, _ = quantized(nn.Sequential(norm, nn.Conv2d(3, 4, 1)))
    fold_(model)
    for each in (norm, model):
        with pytest.raises(ValueError, match="more than (1 value|one element)"):
            each.train()(torch.ones(1, 3, 1, 1))


@with_kernel
def test_the_gradients_of_each_sample_go_through_a_folded_network():
    model, images = normed()
    fold_(model.eval())
    parameters = dict(model.named_parameters())

    def loss(values, image):
        return torch.func.functional_call(model, values, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    _, wanted, _ = outcome(model, images)
    for name, gradient in wanted.items():
        tolerance = 1e-9 if gradient.dtype == torch.float64 else 1e-6  # steps are float32
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=tolerance, atol=tolerance, msg=name)


@with_kernel
def test_a_folded_network_says_that_it_runs_where_there_are_kernels():
    model, images = normed()
    fold_(model)
    with pytest.raises(RuntimeError, match="on meta: move it before fold_"):
        model.to("meta")(images.to("meta"))


def test_a_quantizer_that_measures_its_input_keeps_its_relu():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    nulsq.quantize_(model, nulsq.Policy(preset="none", activation=nulsq.SideRule(quantizer="minmax", bits=4)))
    nulsq.calibrate_(model, [torch.randn(2, 3, 9, 9)])
    assert fold_(model) == []


def test_an_inplace_relu_whose_input_is_read_again_stays():
    class Again(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.first, self.relu, self.second = nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second(self.relu(x)) + x

    assert fold_(quantized(Again(inplace=False))[0]) == ["relu"]
    assert fold_(quantized(Again(inplace=True))[0]) == []


def test_a_network_that_cannot_be_traced_stays_as_it_is():
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model, _ = quantized(Asks(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    assert fold_(model) == [] and type(model[1]) is nn.ReLU


def test_an_observer_after_a_folded_relu_sees_what_the_relu_gave():
    model, images = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    fold_(model)
    seen = []
    model[2].observer = lambda activation, weight: seen.append(activation)
    model(images)
    assert seen[0].min() == 0


# ---- hooks, slices, and the way back


def chain(seed=0, **options):
    """Convolution, batch norm, ReLU, quantized convolution; calibrated, in float64."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(**options), nn.Conv2d(4, 4, 3)).double()
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    nulsq.quantize_(model, nulsq.Policy(preset="none", bits=3))
    return nulsq.calibrate_(model, [images]), images


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda module, args, output: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda module, args: None),
    "full backward": lambda module: module.register_full_backward_hook(lambda module, before, after: None),
    "full backward pre": lambda module: module.register_full_backward_pre_hook(lambda module, after: None),
    "backward": lambda module: module.register_backward_hook(lambda module, before, after: None),
}


@with_kernel
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("hooked", "folded", "warning"), [
    (1, ["2"], r"have hooks: 1 \(BatchNorm2d\)\. The model"),
    (2, [], r"have hooks: 2 \(ReLU\)\. The model"),  # and its batch norm is read by a ReLU then
    (3, [], r"have hooks: 2 \(ReLU\)\. The model"),  # the layer that reads both
])
def test_modules_with_hooks_stay_unfolded_and_one_warning_names_them(kind, hooked, folded, warning):
    model, _ = chain()
    HOOKS[kind](model[hooked])
    with pytest.warns(UserWarning, match=warning) as warnings:
        assert fold_(model) == folded
    assert len(warnings) == 1


@with_kernel
def test_state_dict_hooks_do_not_keep_a_module_unfolded(recwarn):
    model, _ = chain()
    model[1].register_state_dict_post_hook(lambda *_: None)
    model[1].register_load_state_dict_post_hook(lambda *_: None)
    assert fold_(model) == ["2", "1"]
    assert not recwarn.list


@with_kernel
@pytest.mark.parametrize("hooked", [0, 1, 2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_hooks_after_folding_see_what_they_see_in_the_unfolded_model(hooked, training):
    model, images = chain()
    folded = copy.deepcopy(model)
    fold_(folded)
    seen = []
    for each in (model, folded):
        handle = each[hooked].register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
        each.train(training)(images)
        handle.remove()
    torch.testing.assert_close(seen[:2], seen[2:], rtol=1e-11, atol=1e-11)
    assert_same(outcome(folded, images), outcome(model, images))  # statistics counted once; folded again


@with_kernel
@pytest.mark.parametrize("training", [False, True])
def test_slices_of_a_folded_model_compute_what_slices_of_the_model_do(training):
    """With a batch norm and without the quantizer that absorbed it, and the other way round."""
    model, images = chain()
    folded = copy.deepcopy(model)
    fold_(folded)
    maps = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    for first, last, x in ((0, 3, images), (0, 2, images), (2, 4, maps), (3, 4, maps)):
        parts = [each.train(training)[first:last] for each in (folded, model)]
        assert torch.equal(*(part(x) for part in parts))
    assert_same(outcome(folded, images), outcome(model, images))


@with_kernel
def test_the_quantizer_of_a_folded_model_keeps_its_contract_by_itself():
    model, _ = chain()
    fold_(model)
    quantizer, x = model[3].activation_quantizer, torch.randn(100, dtype=torch.float32)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer(x))


@with_kernel
def test_an_error_in_forward_ends_the_forward_pass():
    model, images = chain()
    fold_(model)
    with pytest.raises(RuntimeError, match="channels"):
        model(images[:, :2])
    assert model[1].absorption.passes.running == 0


@with_kernel
def test_repr_and_summary_name_what_was_absorbed():
    model, _ = chain(inplace=True)
    assert "absorb" not in repr(model) and "absorb" not in nulsq.summary(model)
    fold_(model)
    assert repr(model[1]) == f"Absorbed{repr(nn.BatchNorm2d(4))[:-1]}, absorbed by 3.activation_quantizer)"
    assert repr(model[2]) == "AbsorbedReLU(inplace=True, absorbed by 3.activation_quantizer)"
    assert repr(model[3].activation_quantizer).endswith("absorbs 1 (BatchNorm2d), 2 (ReLU))")
    header, first, last, *_ = nulsq.summary(model).splitlines()
    assert header.endswith("absorbed") and last.endswith("1 (BatchNorm2d), 2 (ReLU)") and "ReLU" not in first
    nulsq.unfold_(model)
    assert "absorb" not in repr(model) and "absorb" not in nulsq.summary(model)


@with_kernel
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [normed, chain])
def test_unfolding_restores_output_gradients_and_state_bit_for_bit(make, training):
    model, images = make()
    folded = copy.deepcopy(model)
    modules = dict(folded.named_modules())
    keys = list(folded.state_dict())
    for _ in range(2):
        names = fold_(folded)
        assert names and list(folded.state_dict()) == keys
        assert fold_(folded) == names  # a folded model is folded again
        assert_same(outcome(copy.deepcopy(folded).train(training), images),
                    outcome(copy.deepcopy(model).train(training), images))
        assert nulsq.unfold_(folded) is folded
        assert dict(folded.named_modules()) == modules and list(folded.state_dict()) == keys
        assert [type(module) for module in folded.modules()] == [type(module) for module in model.modules()]
        assert not folded._forward_hooks and not folded._forward_pre_hooks
        found, wanted = (outcome(each.train(training), images) for each in (folded, model))
        assert torch.equal(found[0], wanted[0])
        for a, b in zip(found[1:], wanted[1:], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    nulsq.unfold_(folded)  # an unfolded model stays as it is


@with_kernel
def test_a_copy_of_a_folded_model_unfolds_by_itself():
    model, images = chain()
    fold_(model)
    twin = nulsq.unfold_(copy.deepcopy(model))
    assert type(twin[1]) is nn.BatchNorm2d and not twin._forward_hooks
    assert type(model[1]) is AbsorbedBatchNorm2d and model._forward_hooks
    assert_same(outcome(model, images), outcome(twin, images))
