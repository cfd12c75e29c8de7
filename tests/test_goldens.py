"""Our quantizers and initializers against the vectors of the reference implementation (directory NULSQ_GOLDENS).

A case whose names we do not know fails: it must be mapped in goldens.py, not skipped.
"""

import goldens
import pytest
import torch

from nulsq.quant.calibration.calibrate import keep_larger_
from nulsq.quant.calibration.statistics import BatchStatistics

pytestmark = pytest.mark.skipif(goldens.DIRECTORY is None, reason="NULSQ_GOLDENS names no directory of vectors")


def _params(wanted):
    for case in goldens.cases("quantizers.json"):
        if ("initializer" in case) == wanted:
            yield pytest.param(case, id=case["name"])


def _run(case, *, default_rule=False):
    """The quantizer of a case and its x with gradients, after forward and backward; its output."""
    store, name = goldens.arrays("quantizers.npz"), case["name"]
    x = goldens.tensor(store, f"{name}/x").requires_grad_()
    signed = case["kind"] == "weight" or case["Qn"] > 0 or case["quantizer"] == "LCQ" and bool((x < 0).any())
    quantizer = goldens.build(case["quantizer"], kind=case["kind"], bits=case["bits"],
                              grad_scale=case["grad_scale_mode"], signed=signed, default_rule=default_rule)
    keys = {key.rpartition("/")[2] for key in store.files if key.startswith(f"{name}/param/")} - goldens.CONSTANTS
    with torch.no_grad():
        for key in keys:
            goldens.parameter(quantizer, key).copy_(goldens.tensor(store, f"{name}/param/{key}"))
    quantizer.mark_calibrated_()

    y = quantizer(x)
    y.backward(goldens.tensor(store, f"{name}/dy"))
    return quantizer, x, y, keys


def _compare(case, quantizer, x, y, keys, left_out=None):
    """Output, gradient of x (without the elements left out) and of the parameters against the vectors."""
    store, name = goldens.arrays("quantizers.npz"), case["name"]
    wanted, wanted_grad = goldens.tensor(store, f"{name}/y"), goldens.tensor(store, f"{name}/dx")
    assert (y - wanted).abs().max() <= 1e-6 * (wanted.max() - wanted.min())
    if left_out is not None:
        assert not left_out.all()
        x.grad[left_out] = wanted_grad[left_out] = 0
    assert goldens.relative_error(x.grad, wanted_grad) <= 1e-4
    for key in keys:
        found = goldens.parameter(quantizer, key).grad
        wanted = goldens.tensor(store, f"{name}/dparam/{key}")
        # LCQ's pass through a softmax, whose sums cancel: a vector is 4.4e-6 of its largest away from float64, and what
        # exp is rounded to differs between processors.
        rounding = (5e-6 if case["quantizer"] == "LCQ" else 1e-6) * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted.view(found.shape), rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("case", _params(wanted=False))
def test_quantizer_equals_reference(case):
    _compare(case, *_run(case))


@pytest.mark.parametrize("case", [param for param in _params(wanted=False)
                                  if param.values[0]["quantizer"] in goldens.STE])
def test_quantizer_with_the_default_rule_equals_reference_but_at_the_ends_of_the_range(case):
    """In the form that training takes: the rules `half` and `clip_open` have the reference form only."""
    quantizer, x, y, keys = _run(case, default_rule=True)
    assert type(y.grad_fn).__name__ != "ReferenceBackward"
    levels = quantizer.levels()
    # the reference's ends are the same numbers but for rounding
    ends = [torch.isclose(x.detach(), end, rtol=1e-6, atol=0) for end in (levels[0], levels[-1])]
    _compare(case, quantizer, x, y, keys, left_out=ends[0] | ends[1])


@pytest.mark.parametrize("case", _params(wanted=True))
def test_initializer_equals_reference(case):
    store, name = goldens.arrays("quantizers.npz"), case["name"]
    quantizer = goldens.build(case["quantizer"], kind=case["kind"], bits=case["bits"], init=case["initializer"],
                              signed=None if case["kind"] == "weight" else False)
    with torch.no_grad():
        for batch in range(case["batches"]):
            keep_larger_(quantizer, BatchStatistics.of(goldens.tensor(store, f"{name}/x{batch}")))
    keys = {key.rpartition("/")[2] for key in store.files if key.startswith(f"{name}/param/")} - goldens.CONSTANTS
    assert keys
    for key in keys:
        found = goldens.parameter(quantizer, key)
        torch.testing.assert_close(found, goldens.tensor(store, f"{name}/param/{key}").view(found.shape),
                                   rtol=1e-6, atol=0)
