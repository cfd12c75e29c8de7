"""The state of quantizers: copies, types, other formats, steps that are written between forward passes."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import nulsq
from nulsq import Policy, SideRule

METHODS = ("lsq", "nulsq", "uniq", "lcq", "apot", "minmax")


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def policy(name, bits=4):
    return Policy(bits=bits, rules={}, weight=SideRule(name), activation=SideRule(name))


def images(seed=0, count=8):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def calibrated(name="nulsq", bits=4, x=None):
    return nulsq.calibrate_(nulsq.quantize_(network(), policy(name, bits)), [images() if x is None else x])


# ---- copies


def test_average_made_before_calibration_follows_the_model():
    model = nulsq.quantize_(network(), policy("nulsq"))
    average = AveragedModel(model)
    nulsq.calibrate_(model, [images()])
    average.update_parameters(model)
    assert torch.equal(average(images(1)), model(images(1)))


def test_equal_state_means_equal_model():
    """In-place copies of every tensor, as a broadcast makes them, carry the sign and `calibrated` too."""
    source, target = calibrated(), calibrated(x=images().abs())
    assert source[0].activation_quantizer.signed and not target[0].activation_quantizer.signed
    with torch.no_grad():
        for key, value in source.state_dict().items():
            target.state_dict()[key].copy_(value)
    assert target[0].activation_quantizer.signed and torch.equal(target(images(1)), source(images(1)))


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("name", METHODS)
def test_model_from_the_meta_device_equals_its_source(name, how):
    source = calibrated(name)
    state = {key: value.clone() for key, value in source.state_dict().items()}
    with torch.device("meta"):
        model = network()
    nulsq.quantize_(model, policy(name))
    if how == "to_empty":
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(7)  # memory holds anything
        assert not any(quantizer.calibrated for quantizer in nulsq.quantizers_of(model))
    model.load_state_dict(state, assign=how == "assign")
    for twin in (source, model):
        optimizer = torch.optim.SGD(twin.train().parameters(), lr=0.1)
        if any(True for quantizer in nulsq.quantizers_of(twin) for _ in quantizer.parameters()):
            nulsq.follow_step_(twin, optimizer)
        twin(images(1)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_calibrated_is_read_once_per_change():
    quantizer = calibrated()[0].activation_quantizer
    reads = []
    for write in (False, True, False):
        if write:
            quantizer.sign.fill_(0)
        before = quantizer._sign_read
        quantizer.prepare_()
        reads.append(quantizer._sign_read is not before)
    assert reads == [False, True, False] and quantizer.signed is False


# ---- other formats


@pytest.mark.parametrize(("old", "new"), [
    (("lsq", 4), ("lsq", 2)), (("nulsq", 4), ("nulsq", 3)), (("apot", 4), ("apot", 3)), (("minmax", 4), ("minmax", 2)),
    (("lsq", 4), ("uniq", 4))])
def test_state_of_another_quantizer_is_refused_with_both_named(old, new):
    model = nulsq.quantize_(network(), policy(*new))
    message = f"that of {old[0]} with {old[1]} bits.*, the model has {new[0]} with {new[1]} bits"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(calibrated(*old).state_dict(), strict=strict)


def test_state_dict_from_before_the_grid_was_stored_loads():
    source = calibrated()
    old = {key: value for key, value in source.state_dict().items() if not key.endswith(".grid")}
    model = nulsq.quantize_(network(), policy("nulsq"))
    model.load_state_dict(old)
    assert torch.equal(model(images(1)), source(images(1)))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


# ---- types


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double,
                                  lambda model: model.to(torch.bfloat16)])
def test_steps_and_ranges_stay_float32(cast):
    model = nn.Sequential(calibrated("lsq"), calibrated("minmax"))
    before = [value.clone() for quantizer in nulsq.quantizers_of(model) for value in quantizer.state_dict().values()]
    cast(model)
    after = [value for quantizer in nulsq.quantizers_of(model) for value in quantizer.state_dict().values()]
    assert all(new.dtype == old.dtype and torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert model[0][0].weight.dtype != torch.float32


def test_bfloat16_network_computes_close_to_float32():
    model, x = calibrated("nulsq"), images(1)
    expected = model(x)
    actual = model.bfloat16()(x.bfloat16()).float()
    assert float((actual - expected).norm() / expected.norm()) < 0.1  # a few values cross a threshold


# ---- steps written between forward passes


@pytest.mark.parametrize("name", ["lsq", "nulsq", "uniq"])
def test_closure_never_sees_a_step_that_is_not_positive(name):
    model = calibrated(name)
    labels = torch.arange(8) % 10
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=8)
    nulsq.follow_step_(model, optimizer)
    lowest = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images()), labels)
        lowest.append(min(float(p.min()) for q in nulsq.quantizers_of(model) for p in q.positive_parameters()))
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert min(lowest) > 0


def test_perturbation_below_zero_is_projected_before_the_forward_pass():
    model = calibrated("nulsq")
    steps = model[3].activation_quantizer.steps
    with torch.no_grad():
        steps.sub_(10)  # as sharpness-aware minimization does within its step
    model(images())
    assert (steps > 0).all()


# ---- values that are not finite, tensors without elements


def test_infinite_batch_does_not_enter_the_running_range():
    model = nulsq.quantize_(network(), policy("minmax", 8))
    nulsq.calibrate_(model, [images()])
    quantizer = model[0].activation_quantizer
    before = quantizer.largest.clone()
    for value in (torch.inf, -torch.inf, torch.nan):
        x = images(1)
        x[0, 0, 0, 0] = value
        model.train()(x)
        quantizer.after_step_()
        assert torch.equal(quantizer.largest, before)
    model.train()(100 * images(1))
    quantizer.after_step_()
    assert quantizer.largest > before


@pytest.mark.parametrize("grad_scale", ["none", "lsq", "channels", "batch"])
@pytest.mark.parametrize("name", METHODS)
def test_empty_batch_passes(name, grad_scale):
    side = SideRule(name, grad_scale=grad_scale)
    model = nulsq.quantize_(network(), Policy(bits=4, rules={}, weight=side, activation=side))
    nulsq.calibrate_(model, [images(), images()[:0]])
    for training in (True, False):
        y = model.train(training)(images()[:0])
        assert y.shape == (0, 10)
        if y.requires_grad:
            y.sum().backward()


# ---- the compiled kernel's folder


def test_user_without_a_home_directory_gets_one_warning_and_the_slower_form(monkeypatch):
    from nulsq.quant.op.cpu import kernel

    for variable in ("NULSQ_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    kernel._library.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = calibrated()(images())
        messages = [str(warning.message) for warning in caught if "home directory" in str(warning.message)]
        assert y.isfinite().all() and len(messages) == 1 and "set NULSQ_CACHE" in messages[0]
    finally:
        kernel._library.cache_clear()
