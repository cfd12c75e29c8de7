"""A ReLU folded into the quantizers that read it: same output, same gradients, and only where nobody else reads it."""

import copy

import pytest
import torch
from torch import nn

import nulsq
from nulsq.models import build_model
from nulsq.quant.fold_relu import fold_relu_
from nulsq.quant.op import FORMS, force


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


def test_folds_where_quantized_layers_alone_read():
    model, _ = quantized(Residual())
    assert fold_relu_(model) == ["shared", "single"]
    assert type(model.shared) is nn.Identity and type(model.summed) is nn.ReLU
    assert {name for name, layer in model.named_children() if getattr(layer, "activation_quantizer", None) is not None
            and layer.activation_quantizer.relu} == {"left", "right", "last"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_same_output_gradients_and_state_bit_for_bit(form, inplace, training):
    torch.manual_seed(0)
    model, images = quantized(Residual(inplace))
    folded = copy.deepcopy(model)
    assert fold_relu_(folded)
    with force(form):
        wanted, found = outcome(model.train(training), images), outcome(folded.train(training), images)
    assert torch.equal(found[0], wanted[0])
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("name", "size", "count"), [
    ("pytorchcv:preresnet20_cifar10", 32, 18), ("timm:resnet18", 64, 11), ("timm:regnetx_002", 64, 30),
    ("torchvision:resnet18", 64, 0), ("timm:deit_tiny_patch16_224", 224, 0)])
def test_real_networks(name, size, count):
    torch.manual_seed(0)
    model, images = quantized(build_model(name, 10), size)
    wanted = outcome(model.eval(), images)
    modes = [module.training for module in model.modules()]
    assert len(fold_relu_(model)) == count
    assert [module.training for module in model.modules()] == modes
    found = outcome(model, images)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][key], wanted[1][key]) for key in wanted[1])


def test_a_quantizer_that_measures_its_input_keeps_its_relu():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    nulsq.quantize_(model, nulsq.Policy(preset="none", activation=nulsq.SideRule(quantizer="minmax", bits=4)))
    nulsq.calibrate_(model, [torch.randn(2, 3, 9, 9)])
    assert fold_relu_(model) == []


def test_an_inplace_relu_whose_input_is_read_again_stays():
    class Again(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.first, self.relu, self.second = nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second(self.relu(x)) + x

    assert fold_relu_(quantized(Again(inplace=False))[0]) == ["relu"]
    assert fold_relu_(quantized(Again(inplace=True))[0]) == []


def test_a_network_that_cannot_be_traced_stays_as_it_is():
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model, _ = quantized(Asks(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    assert fold_relu_(model) == [] and type(model[1]) is nn.ReLU


def test_an_observer_behind_a_folded_relu_sees_what_the_relu_gave():
    model, images = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    fold_relu_(model)
    seen = []
    model[2].observer = seen.append
    model(images)
    assert seen[0].min() == 0
