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


@pytest.mark.parametrize("case", _params(wanted=False))
def test_quantizer_equals_reference(case):
    store, name = goldens.arrays("quantizers.npz"), case["name"]
    x = goldens.tensor(store, f"{name}/x").requires_grad_()
    signed = case["kind"] == "weight" or case["Qn"] > 0 or case["quantizer"] == "LCQ" and bool((x < 0).any())
    quantizer = goldens.build(case["quantizer"], kind=case["kind"], bits=case["bits"],
                              grad_scale=case["grad_scale_mode"], signed=signed)
    keys = {key.rpartition("/")[2] for key in store.files if key.startswith(f"{name}/param/")} - goldens.CONSTANTS
    with torch.no_grad():
        for key in keys:
            goldens.parameter(quantizer, key).copy_(goldens.tensor(store, f"{name}/param/{key}"))
    quantizer.mark_calibrated_()

    y = quantizer(x)
    y.backward(goldens.tensor(store, f"{name}/dy"))

    wanted = goldens.tensor(store, f"{name}/y")
    assert (y - wanted).abs().max() <= 1e-6 * (wanted.max() - wanted.min())
    assert goldens.relative_error(x.grad, goldens.tensor(store, f"{name}/dx")) <= 1e-4
    for key in keys:
        found = goldens.parameter(quantizer, key).grad
        wanted = goldens.tensor(store, f"{name}/dparam/{key}")
        # LCQ's pass through a softmax, whose sums cancel: a vector is 4.4e-6 of its largest away from float64, and what
        # exp is rounded to differs between processors.
        rounding = (5e-6 if case["quantizer"] == "LCQ" else 1e-6) * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted.view(found.shape), rtol=1e-4, atol=rounding)


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
