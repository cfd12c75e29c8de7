"""Backward never changes the gradient that it receives: others may hold it, in ways that torch does not show."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nulsq
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import FORMS, available, fake_quantize, force
from nulsq.quant.op.batch_affine import batch_affine

needs_kernel = pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")
FORM_PARAMS = [pytest.param(form, marks=needs_kernel) if form == "fused" else form for form in FORMS]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=["lsq", "nulsq", "lcq"])
def quantizer(request):
    quantizer = nulsq.get_quantizer(request.param)(4, "activation", signed=False)
    quantizer.reset_(Statistics.of(tensor(3).relu()))
    return quantizer


def tensor(seed, *shape):
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


class FromNumPy(torch.autograd.Function):
    """The identity, whose backward returns a NumPy array's memory as the gradient, as wrapped simulators do."""

    @staticmethod
    def forward(ctx, x, buffer):
        ctx.buffer = buffer
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return torch.from_numpy(ctx.buffer), None


def channels_last_buffer(memory) -> np.ndarray:
    """A gradient of shape [4, 3, 8, 8] in the given order of memory."""
    values = tensor(7).numpy()
    return values if memory is torch.contiguous_format else np.ascontiguousarray(
        values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("form", FORM_PARAMS)
def test_a_numpy_buffer_returned_by_another_backward_is_unchanged(form, memory, quantizer):
    buffer = channels_last_buffer(memory)
    before = buffer.copy()
    x = tensor(1).contiguous(memory_format=memory).requires_grad_()
    with force(form):
        FromNumPy.apply(quantizer(x), buffer).sum().backward()
    assert np.array_equal(buffer, before)
    assert 0 < (x.grad != 0).sum() < x.numel()


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("form", FORM_PARAMS)
def test_a_numpy_buffer_is_unchanged_after_a_folded_batch_norm(form, memory, quantizer):
    buffer = channels_last_buffer(memory)
    before = buffer.copy()
    x = tensor(1).contiguous(memory_format=memory).requires_grad_()
    affine, *_ = batch_affine(x, torch.ones(3), torch.zeros(3), 1e-5)
    y = fake_quantize(x, quantizer.table(), quantizer.rule()._replace(relu=True), form, affine)
    FromNumPy.apply(y, buffer).sum().backward()
    assert np.array_equal(buffer, before)
    assert x.grad.any()


# ---- every holder of a gradient sees the same values as with the reference form


def into_a_convolution(quantizer, x, r):
    return F.conv2d(quantizer(x), tensor(9, 5, 3, 3, 3)), []


def kept_by_a_hook(quantizer, x, r):
    y, kept = quantizer(x), []
    y.register_hook(kept.append)
    return F.conv2d(y, tensor(9, 5, 3, 3, 3)), kept


def kept_as_a_view(quantizer, x, r):
    y, kept = quantizer(x), []
    y.register_hook(lambda gradient: kept.append(gradient.detach().flatten()))
    return y * 3, kept


def kept_as_a_storage(quantizer, x, r):
    y, kept = quantizer(x), []
    y.register_hook(lambda gradient: kept.append(gradient.untyped_storage()))
    return y * 3, kept


def retained(quantizer, x, r):
    y = quantizer(x)
    y.retain_grad()
    return y * 3, [y]


def shared_in_a_sum(quantizer, x, r):
    return (quantizer(x) + r) * 3, []


def shared_by_two_quantizers(quantizer, x, r):
    return (quantizer(x) + quantizer(r)) * 3, []


def sum_with_its_own_input(quantizer, x, r):
    return (quantizer(x) + x) * 3, []


def one_after_the_other(quantizer, x, r):
    return quantizer(quantizer(x) * 0.7), []


def kept_by_a_module(quantizer, x, r):
    kept = []

    class Wrapper(nn.Module):
        def forward(self, x):
            return quantizer(x)

    module = Wrapper()
    module.register_full_backward_hook(lambda module, grad_input, grad_output: kept.extend(grad_output))
    return module(x) * 3, kept


def broadcast(quantizer, x, r):
    return quantizer(x).sum(), []


def through_views(quantizer, x, r):
    return quantizer(x).flatten(1)[:, 7:] * 3, []


USES = [into_a_convolution, kept_by_a_hook, kept_as_a_view, kept_as_a_storage, retained, shared_in_a_sum,
        shared_by_two_quantizers, sum_with_its_own_input, one_after_the_other, kept_by_a_module, broadcast,
        through_views]


def gradients(use, quantizer, form) -> tuple[list[Tensor], list[Tensor]]:
    """Every gradient of an input or that is kept by the use, and those of the quantizer's parameters."""
    quantizer.zero_grad()
    x, r = (tensor(seed).requires_grad_() for seed in (1, 2))
    with force(form):
        out, kept = use(quantizer, x, r)
        grad_output = tensor(5, *out.shape) if out.dim() else torch.ones(())
        before = grad_output.clone()
        out.backward(grad_output)
    assert torch.equal(grad_output, before)
    kept = [torch.tensor(holder.tolist()) if isinstance(holder, torch.UntypedStorage) else
            holder.grad if holder.requires_grad else holder for holder in kept]
    inputs = [leaf.grad for leaf in (x, r) if leaf.grad is not None]
    return [*inputs, *kept], [parameter.grad.clone() for parameter in quantizer.parameters()]


@needs_kernel
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_every_holder_of_a_gradient_sees_what_the_reference_form_gives(use, quantizer):
    tensors, sums = gradients(use, quantizer, "fused")
    expected_tensors, expected_sums = gradients(use, quantizer, "reference")
    for actual, expected in zip(tensors, expected_tensors, strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(sums, expected_sums, strict=True):  # added up in another order
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@needs_kernel
def test_gradients_returned_by_autograd_grad_are_unchanged(quantizer):
    with force("fused"):
        for create_graph in (False, True):
            x = tensor(1).requires_grad_()
            y = quantizer(x)
            factor = tensor(4)
            gradients = torch.autograd.grad((y * factor).sum(), [x, y], create_graph=create_graph)
            assert torch.equal(gradients[1], factor)
            y = quantizer(x)
            grad_output = factor.clone()
            torch.autograd.grad(y, x, grad_output)
            assert torch.equal(grad_output, factor)
