"""A whole PreResNet-20 with our quantizers against the same network with the published formulas written out.

In float64, where no rounding moves an activation across a threshold: logits, loss and every gradient have to agree on
any processor, which the reference's float32 vectors cannot ask for (tests/test_goldens_network.py).
"""

import copy

import pytest
import torch
from test_methods import DEFINITIONS
from torch.nn import functional as F

import nulsq
from nulsq.quant.settings import Policy, SideRule
from tests.float64 import to_float64


def by_the_formula(quantizer):
    """A forward that does what the paper says, element by element, with plain autograd."""
    def forward(x):
        parameters = list(quantizer.parameters())
        elements = quantizer._elements(x)
        if elements is not None:  # the gradient scale of LSQ on one step, of a clipping threshold Qp steps long
            high = quantizer.level_range[1]
            factor = (high / elements) ** 0.5 if quantizer.name() in ("apot", "lcq") else 1 / (elements * high) ** 0.5
            parameters = [p * factor + (p - p * factor).detach() for p in parameters]
        return DEFINITIONS[quantizer.name()](x, quantizer.signed, quantizer.bits, *parameters)
    return forward


def training_step(model, images, labels):
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("weight", "activation", "bits", "grad_scale"), [
    ("lsq", "lsq", 2, "channels"), ("lsq", "nulsq", 2, "none"), ("nulsq", "nulsq", 3, "none"),
    ("lcq", "lcq", 3, "none"), ("lcq", "lcq", 2, "channels"), ("apot", "apot", 4, "channels"),
    ("uniq", "uniq", 2, "batch")])
def test_a_training_step_equals_that_of_the_formulas(weight, activation, bits, grad_scale):
    provider = pytest.importorskip("pytorchcv.model_provider")
    torch.manual_seed(0)
    model = provider.get_model("preresnet20_cifar10", pretrained=False)
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4, 3, 32, 32, generator=draw), torch.randint(0, 10, (4,), generator=draw)
    sides = [SideRule(quantizer=name, grad_scale=grad_scale) for name in (weight, activation)]
    nulsq.quantize_(model, Policy(bits=bits, weight=sides[0], activation=sides[1], rules={}))
    nulsq.calibrate_(model, [images])
    to_float64(model).train()
    with torch.no_grad():  # away from equal steps and from ties
        for quantizer in nulsq.quantizers_of(model):
            for parameter in quantizer.parameters():
                parameter.mul_(0.9 + 0.2 * torch.rand(parameter.shape, generator=draw))
            if getattr(quantizer, "theta", None) is not None:
                quantizer.theta.copy_(torch.randn(quantizer.theta.shape, generator=draw) * 0.3)
    formulas = copy.deepcopy(model)
    for quantizer in nulsq.quantizers_of(formulas):
        quantizer.forward = by_the_formula(quantizer)

    logits, loss, gradients = training_step(model, images.double(), labels)
    wanted_logits, wanted_loss, wanted = training_step(formulas, images.double(), labels)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-8 * max(scale, 1e-3), msg=name)
