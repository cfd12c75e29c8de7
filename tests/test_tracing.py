"""Quantized networks under the tools of torch: keywords, tracing, export, transforms, gradients of gradients."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import nulsq
from nulsq import Policy, SideRule
from nulsq.quant.op import available, force
from tests.test_any_layer import Standardized


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.middle = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Standardized(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.middle(self.norm(self.conv(input=x)).relu()).relu()
        return self.head(input=x.mean((2, 3)))


def images(seed=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(policy=None):
    torch.manual_seed(0)
    model = nulsq.quantize_(Network(), policy or Policy(bits=3))
    return nulsq.calibrate_(model, [images()]).eval()


@pytest.mark.parametrize("protocol", ["float", "reference"])
def test_layers_take_their_input_as_a_keyword(protocol):
    torch.manual_seed(0)
    model = nulsq.calibrate_(nulsq.quantize_(Network(), Policy(bits=3)), [images()], protocol)
    assert model(images()).shape == (4, 4)


def test_symbolic_trace_keeps_each_layer_as_one_module():
    model = network()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images(1)), model(images(1)))
    assert {node.target for node in traced.graph.nodes if node.op == "call_module"} == {"conv", "norm", "middle",
                                                                                       "head"}
    with torch.no_grad():
        model.middle.activation_quantizer.steps.mul_(2)  # the traced network uses the same quantizers
    assert torch.equal(traced(images(1)), model(images(1)))


def test_feature_extraction_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = network()
    features = extraction.create_feature_extractor(model, {"middle": "features"})(images(1))["features"]
    assert torch.equal(model.head(features.relu().mean((2, 3))), model(images(1)))


def test_export_equals_eager():
    model = network()
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images(1)), model(images(1)), rtol=1e-5, atol=1e-5)


def test_torchscript_trace_is_saved_and_equals_eager():
    model, buffer = network(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; shapes become constants
        torch.jit.save(torch.jit.trace(model, images()), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    assert torch.equal(loaded(images(1)), model(images(1)))


def test_compiled_network_with_a_subclassed_layer_has_no_graph_break():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images(1)), model(images(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", [Policy(bits=2, rules={}), Policy(bits=2)], ids=["learned", "with_minmax"])
def test_per_sample_gradients_equal_those_of_single_images(policy):
    model, x, labels = network(policy), images(1), torch.arange(4)
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    together = vmap(grad(loss), (None, 0, 0))(parameters, x, labels)
    for number in range(4):
        model.zero_grad()
        F.cross_entropy(model(x[number:number + 1]), labels[number:number + 1]).backward()
        for key, parameter in parameters.items():
            torch.testing.assert_close(together[key][number], parameter.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["lsq", "nulsq", "uniq", "lcq", "apot"])
@pytest.mark.parametrize("form", ["eager", None])
def test_gradients_of_gradients_equal_those_of_the_reference_form(name, form):
    side = SideRule(name)
    model = network(Policy(bits=4, rules={}, weight=side, activation=side))
    parameters = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=draw) for p in parameters]

    def second_derivatives():
        x = images(1).requires_grad_()
        loss = F.cross_entropy(model(x), torch.arange(4))
        first = torch.autograd.grad(loss, [x, *parameters], create_graph=True)
        total = first[0].square().sum() + sum((g * d).sum() for g, d in zip(first[1:], directions, strict=True))
        return torch.autograd.grad(total, [x, *parameters], allow_unused=True)

    with force("reference"):
        expected = second_derivatives()
    with force(form):
        actual = second_derivatives()
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-7)


@pytest.mark.skipif(not available("cpu"), reason="no C++ compiler: batch norms are not folded")
def test_folded_network_refuses_gradients_of_gradients():
    from nulsq.quant.fold import fold_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    nulsq.calibrate_(nulsq.quantize_(model, Policy(bits=3, rules={})), [images()])
    assert fold_(model)
    with pytest.raises(RuntimeError, match="call nulsq.unfold_"):
        torch.autograd.grad(model(images()).square().sum(), model[0].weight, create_graph=True)
    nulsq.unfold_(model)
    assert torch.autograd.grad(model(images()).square().sum(), model[0].weight, create_graph=True)[0].requires_grad
