"""Where backward writes dx over dy, nobody notices; where somebody would, it does not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nulsq
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import available, force
from nulsq.quant.op import sole as counting

pytestmark = pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")


@pytest.fixture(params=["lsq", "nulsq"])
def quantizer(request):
    made = nulsq.get_quantizer(request.param)(4, "activation", signed=False)
    made.reset_(Statistics.of(tensor(3).relu()))
    return made


def tensor(seed, *shape):
    return torch.randn(shape or (4, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def plain(quantizer, x, r):
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

    class Plain(nn.Module):
        def forward(self, x):
            return quantizer(x)

    made = Plain()
    made.register_full_backward_hook(lambda module, given, out: kept.extend(out))
    return made(x) * 3, kept


def broadcast(quantizer, x, r):
    return quantizer(x).sum(), []


def through_views(quantizer, x, r):
    return quantizer(x).flatten(1)[:, 7:] * 3, []


WAYS = [plain, kept_by_a_hook, kept_as_a_view, kept_as_a_storage, retained, shared_in_a_sum, shared_by_two_quantizers,
        sum_with_its_own_input, one_after_the_other, kept_by_a_module, broadcast, through_views]


def outcome(way, quantizer, never):
    """Every gradient that anybody sees, with dx over dy where that is thought to be safe, or never."""
    with pytest.MonkeyPatch.context() as patch:
        if never:
            patch.setattr(counting, "references_alone", lambda: None)
        quantizer.zero_grad()
        x, r = (tensor(seed).requires_grad_() for seed in (1, 2))
        out, kept = way(quantizer, x, r)
        given = tensor(5, *out.shape) if out.dim() else torch.ones(())
        before = given.clone()
        out.backward(given)
        assert torch.equal(given, before)
        kept = [torch.tensor(each.tolist()) if isinstance(each, torch.UntypedStorage) else
                each.grad if each.requires_grad else each for each in kept]
        return [x.grad, r.grad, *kept, *(each.grad.clone() for each in quantizer.parameters())]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_same_gradients_for_everybody(way, quantizer):
    with force("fused"):
        for mine, theirs in zip(outcome(way, quantizer, False), outcome(way, quantizer, True), strict=True):
            assert mine is theirs or torch.equal(mine, theirs)


def test_gradients_that_are_asked_for_stay(quantizer):
    with force("fused"):
        for asked in (False, True):
            x = tensor(1).requires_grad_()
            y = quantizer(x)
            factor = tensor(4)
            found = torch.autograd.grad((y * factor).sum(), [x, y], create_graph=asked)
            assert torch.equal(found[1], factor)
            y = quantizer(x)
            given = factor.clone()
            torch.autograd.grad(y, x, given)
            assert torch.equal(given, factor)


def places(after, x, quantizer):
    """Where in memory dy and dx were."""
    found = []
    y = quantizer(x := x * 1)
    for each in (y, x):
        each.register_hook(lambda gradient: found.append(gradient.data_ptr()))
    after(y).sum().backward()
    return found


def test_dx_is_where_dy_was_behind_a_convolution_and_a_product(quantizer):
    with force("fused"):
        for after in (lambda y: F.conv2d(y, tensor(9, 5, 3, 3, 3)), lambda y: y * 3):
            dy, dx = places(after, tensor(1).requires_grad_(), quantizer)
            assert dx == dy


def test_a_torch_that_cannot_tell_never_writes_over(quantizer, monkeypatch):
    """Where references are not told, or where a gradient that is kept has no more of them."""
    for answer in ((), (1, 2, 6, 3)):
        monkeypatch.setattr(counting, "references", lambda tensor, answer=answer: answer)
        counting.references_alone.cache_clear()
        try:
            with force("fused"):
                dy, dx = places(lambda y: y * 3, tensor(1).requires_grad_(), quantizer)
            assert dx != dy and counting.references_alone() is None
        finally:
            monkeypatch.undo()
            counting.references_alone.cache_clear()
    assert counting.references_alone()
