"""The contract over all quantizers x bits x roles x granularity. A new file in nulsq/quantizers is under test
the moment it exists; `pytest --quantizer my_lab.my_quantizer` tests one of yours."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nulsq
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.settings import INITIALIZERS

CHANNELS = 4


def pytest_generate_tests(metafunc):
    if "form" not in metafunc.fixturenames:
        return
    own = metafunc.config.getoption("--quantizer")
    forms = [(name, bits, role, signed, channels)
             for name in ([own] if own else nulsq.available())
             for bits in (1, 2, 3, 4, 6, 8)
             for role, signed in (("weight", True), ("activation", False), ("activation", True))
             for channels in ((None, CHANNELS) if role == "weight" else (None,))
             if bits in (2, 3, 4) or _exists(name, bits, role, signed, channels)]
    ids = [f"{name}-{bits}bit-{role}-{'signed' if signed else 'unsigned'}{'-per_channel' if channels else ''}"
           for name, bits, role, signed, channels in forms]
    metafunc.parametrize("form", forms, ids=ids)


def _exists(name, bits, role, signed, channels):
    """Every method has 2 to 4 bits; others it may refuse."""
    try:
        nulsq.get_quantizer(name)(bits, role, signed=signed, channels=channels)
    except ValueError:
        return False
    return True


def sample(form, seed=0, size=(CHANNELS, 6, 5, 5)):
    signed = form[3]
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.7
    return x if signed else x.relu()


def build(form, *, random_steps=True, init="nmse", **options):
    """nmse: the search for the best step would take most of the time of these tests."""
    name, bits, role, signed, channels = form
    quantizer = nulsq.get_quantizer(name)(bits, role, signed=signed, channels=channels, init=init, **options)
    quantizer.reset_(Statistics.of(sample(form), per_channel=channels is not None))
    if random_steps:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            positive = {id(parameter) for parameter in quantizer.positive_parameters()}
            for parameter in quantizer.parameters():
                if id(parameter) in positive:
                    parameter.mul_(0.5 + torch.rand(parameter.shape, generator=draw))
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)
    return quantizer.eval()


def test_forward_equals_decode_of_encode(form):
    quantizer, x = build(form), sample(form, 2)
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))


def test_ties_at_thresholds_agree_in_forward_and_encode(form):
    quantizer = build(form)
    thresholds = quantizer.thresholds()
    x = thresholds if thresholds.dim() == 2 else thresholds.expand(CHANNELS, -1).contiguous()
    assert torch.equal(quantizer(x), quantizer.decode(quantizer.encode(x)))


def test_idempotent(form):
    quantizer, x = build(form), sample(form, 3)
    if getattr(quantizer, "range", None) == "dynamic":
        pytest.skip("a dynamic range is a function of its input: the largest level need not be the largest input")
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)


def test_levels_are_sorted_and_at_most_two_to_the_bits(form):
    levels, thresholds = build(form).levels(), build(form).thresholds()
    assert levels.shape[-1] <= 2 ** form[1]
    assert levels.shape[-1] == thresholds.shape[-1] + 1
    assert (levels.diff(dim=-1) > 0).all()
    assert (thresholds > levels[..., :-1]).all() and (thresholds < levels[..., 1:]).all()


def test_output_is_a_level_and_monotone(form):
    quantizer = build(form)
    x = sample(form, 4).flatten(1).sort(1).values
    y = quantizer(x)
    assert (y.diff(dim=1) >= 0).all()
    quantizer.set_range_(x)  # a forward pass in evaluation does not store the range of a weight
    levels = quantizer.levels()
    levels = levels if levels.dim() == 2 else levels.expand(CHANNELS, -1)
    for row, allowed in zip(y, levels, strict=True):
        assert torch.isin(row, allowed).all()


def test_gradients_are_finite_with_zeros_in_the_input(form):
    quantizer = build(form).train()
    x = sample(form, 5)
    x[:, :2] = 0
    x.requires_grad_()
    quantizer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in quantizer.parameters())


def test_nan_stays_nan_and_is_not_encoded(form):
    quantizer, x = build(form), sample(form, 6)
    x[0, 0, 0, 0] = torch.nan
    if getattr(quantizer, "range", None) != "dynamic":
        y = quantizer(x)
        assert y[0, 0, 0, 0].isnan() and y.isnan().sum() == 1
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer.encode(x)


def test_infinities_clip_in_forward_and_are_refused_by_encode(form):
    quantizer, x = build(form), sample(form, 7)
    if getattr(quantizer, "range", None) == "dynamic":
        pytest.skip("the range of an infinite input is infinite")
    x[0, 0, 0, 0] = torch.inf
    levels = quantizer.levels()
    assert quantizer(x)[0, 0, 0, 0] == (levels[0] if levels.dim() == 2 else levels)[-1]
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantizer.encode(x)


def test_bfloat16_in_bfloat16_out(form):
    quantizer, x = build(form), sample(form, 8)
    y = quantizer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, quantizer(x.bfloat16().float()).bfloat16())


def test_bfloat16_is_monotone_within_its_rounding(form):
    quantizer, x = build(form), sample(form, 10).flatten(1).sort(1).values
    assert (quantizer(x.bfloat16()).float().diff(dim=1) >= 0).all()  # rounding is monotone too


def test_autocast_changes_nothing_for_float32_inputs(form):
    quantizer, x = build(form), sample(form, 11)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(x)
    assert torch.equal(inside, quantizer(x))


def test_state_dict_pickle_and_copy_keep_everything(form):
    quantizer, x = build(form), sample(form, 9)
    name, bits, role, _, channels = form
    fresh = nulsq.get_quantizer(name)(bits, role, channels=channels)  # its sign is in the state dict
    fresh.load_state_dict(quantizer.state_dict())
    for other in (fresh.eval(), pickle.loads(pickle.dumps(quantizer)), copy.deepcopy(quantizer)):
        assert torch.equal(other(x), quantizer(x))
        assert other.signed == quantizer.signed


@pytest.mark.parametrize("init", INITIALIZERS)
def test_every_initializer_gives_a_usable_grid(form, init):
    quantizer = build(form, random_steps=False, init=init)
    assert torch.isfinite(quantizer.levels()).all()
    assert (quantizer.levels().diff(dim=-1) > 0).all()


def test_a_tensor_of_zeros_gives_a_usable_grid(form):
    name, bits, role, signed, channels = form
    quantizer = nulsq.get_quantizer(name)(bits, role, signed=signed, channels=channels)
    quantizer.reset_(Statistics.of(torch.zeros(CHANNELS, 8), per_channel=channels is not None))
    assert torch.isfinite(quantizer(torch.zeros(CHANNELS, 8))).all()


def test_projection_keeps_steps_positive_and_nan_visible(form):
    quantizer = build(form)
    for parameter in quantizer.positive_parameters():
        with torch.no_grad():
            parameter.view(-1)[0] = -1.0
            parameter.view(-1)[-1] = torch.nan
        quantizer.after_step_()
        assert parameter.view(-1)[0] > 0 or parameter.numel() == 1
        assert parameter.view(-1)[-1].isnan()


def test_uncalibrated_quantizer_says_what_to_call(form):
    name, bits, role, _, channels = form
    with pytest.raises(RuntimeError, match="calibrate_"):
        nulsq.get_quantizer(name)(bits, role, channels=channels)(sample(form))


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), bits=st.sampled_from([2, 3, 4]),
       signed=st.booleans(), granularity=st.sampled_from(["activation", "weight", "per channel"]),
       name=st.sampled_from(nulsq.available()))
@settings(max_examples=150, deadline=None)
def test_laws_hold_at_any_scale(seed, scale, bits, signed, granularity, name):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(CHANNELS, 257, generator=draw) * scale
    x[:, ::19] = 0
    role = "activation" if granularity == "activation" else "weight"
    x = x if signed or role == "weight" else x.abs()
    channels = CHANNELS if granularity == "per channel" else None
    quantizer = nulsq.get_quantizer(name)(bits, role, signed=signed or role == "weight", channels=channels)
    quantizer.reset_(Statistics.of(x, per_channel=channels is not None))
    with torch.no_grad():
        for parameter in quantizer.positive_parameters():
            parameter.mul_(0.2 + torch.rand(parameter.shape, generator=draw))
    quantizer.eval()
    y = quantizer(x.requires_grad_())
    assert torch.equal(y, quantizer.decode(quantizer.encode(x.detach())))
    if getattr(quantizer, "range", None) != "dynamic":  # whose range is a function of its input
        assert torch.equal(quantizer(y.detach()), y)
    order = x.detach().argsort(1)
    assert (y.detach().gather(1, order).diff(dim=1) >= 0).all()
    rows = y if channels else y.view(1, -1)
    assert all(len(row.unique()) <= 2**bits for row in rows)
    y.square().sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in (x, *quantizer.parameters()))
