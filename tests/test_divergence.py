"""The divergence guard: detection of bad steps, rollback, skipped batches, giving up, and the diagnosis."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import nulsq
import nulsq.train
import nulsq.training.step
from bench.counts import Waits
from nulsq.config.recipe import Guard
from nulsq.distributed import Ranks
from nulsq.quant.projection import quantizers_of
from nulsq.run import checkpoint
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import read_outcome
from nulsq.train import train
from nulsq.training.divergence import WARM_UP, Diverged, DivergenceGuard, find_nonfinite
from tests.runs import assert_same_state, last, numbers

ALONE = Ranks(0, 1, torch.device("cpu"))
NAN, INF = math.nan, math.inf


def judge(losses, norms=None, **settings):
    """The first bad step, or None, and the running mean of the guard after it."""
    guard = DivergenceGuard(Guard(**settings), 10, ALONE)
    try:
        for step, loss in enumerate(losses):
            guard.observe(step, torch.tensor(loss), torch.tensor(1.0 if norms is None else norms[step]))
        guard.check()
    except Diverged as divergence:
        return divergence.step, guard.state_dict()
    return None, guard.state_dict()


GOOD = [1.0] * WARM_UP


@pytest.mark.parametrize("every", [1, 7, 50])
@pytest.mark.parametrize(("losses", "bad"), [
    ([*GOOD, NAN, 1.0], 20), ([*GOOD, INF], 20), ([*GOOD, 25.0, 1.0, 30.0], 20), ([*GOOD, 19.0], None), (GOOD, None),
    ([1.0] * 5 + [1000.0], None),  # before the guard has a usual loss
    ([0.001] * 30 + [1.0], None),  # not above the loss of guessing among ten classes
    ([0.001] * 30 + [2.4], 30),
])
def test_guard_finds_the_first_bad_step_for_every_check_interval(every, losses, bad):
    assert judge(losses, every=every)[0] == bad
    assert judge(losses, every=every)[1] == judge(losses, every=3)[1]


def test_nonfinite_gradient_norm_is_reported_at_its_step():
    assert judge(GOOD, [1.0] * 7 + [INF] + [1.0] * 12)[0] == 7
    assert judge([*GOOD, 1e9], spike=None)[0] is None


def test_observing_a_step_does_not_synchronize():
    guard = DivergenceGuard(Guard(every=20), 10, ALONE)
    loss = torch.tensor(1.0)
    with Waits() as waits:
        for step in range(19):
            guard.observe(step, loss, loss)
        assert waits.count == 0


def spoil(monkeypatch, steps_done, condition, change):
    """Call `change(model)` after the backward pass of every step for which `condition(step)` is true."""
    original = nulsq.training.step.backward

    def backward(model, *rest, **options):
        loss = original(model, *rest, **options)
        if condition(steps_done[-1]):
            change(model)
        return loss
    monkeypatch.setattr(nulsq.training.step, "backward", backward)


def bad_gradient(model):
    model.output.bias.grad[0] = NAN


def test_rollback_equals_a_run_that_skips_the_bad_batch(short, float_run, uninterrupted, steps_done, monkeypatch,
                                                        capsys):
    """The reference is a run whose checkpoint already lists this batch as skipped."""
    recipe, expected = (short(name, model__init_from=str(float_run), optim__epochs=3)
                        for name in ("rollback", "skipping"))
    train(expected, stop=lambda: True, quiet=True)  # saves after its first step
    content = last(path_of(expected))
    checkpoint.save(path_of(expected), content | {"skipped": [5]})
    assert train(expected, quiet=True).status == "finished"
    spoil(monkeypatch, steps_done, lambda step: step == 5, bad_gradient)
    state = train(recipe)
    assert (state.status, state.skipped) == ("finished", [5])
    message = "step 5 went wrong; going back to step 4 and leaving its batch out (1 of at most 3)"
    assert message in capsys.readouterr().out
    assert numbers(path_of(recipe)) == numbers(path_of(expected))
    assert [line["train_images"] for line in read_metrics(path_of(recipe))] == [128, 96, 128]
    assert_same_state(last(path_of(recipe)), last(path_of(expected)))
    assert numbers(path_of(recipe))[0] == numbers(uninterrupted)[0]
    assert numbers(path_of(recipe)) != numbers(uninterrupted)
    assert read_outcome(path_of(recipe))["skipped"] == [5]


def test_run_exceeding_its_rollbacks_diverges_and_names_the_quantizer(short, float_run, steps_done, monkeypatch):
    recipe, reported = short("diverged", model__init_from=str(float_run), optim__epochs=3, guard__rollbacks=2), []

    def bad_step_size(model):
        name, quantizer = next((name, module) for name, module in model.named_modules()
                               if module in quantizers_of(model) and module.role == "activation"
                               and list(module.parameters()))
        next(quantizer.parameters()).grad.fill_(INF)
        bad_step_size.name = name

    spoil(monkeypatch, steps_done, lambda step: step >= 5, bad_step_size)
    state = train(recipe, report=lambda metrics, _: reported.append(metrics), quiet=True)
    assert (state.status, state.skipped) == ("diverged", [5, 6])
    outcome = read_outcome(path_of(recipe))
    assert (outcome["outcome"], outcome["step"], outcome["requeue"]) == ("diverged", 7, False)
    assert f"quantizer {bad_step_size.name}: the gradient of its" in outcome["error"]
    assert len(reported) == 2 and reported[0]["epoch"] == 1 and math.isnan(reported[1]["val_top1"])
    assert last(path_of(recipe))["step"] == 4 and len(read_metrics(path_of(recipe))) == 1


def test_find_nonfinite_names_the_first_module_in_network_order(digits):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    images = torch.randn(2, 3, 8, 8)
    nulsq.calibrate_(nulsq.quantize_(model, nulsq.Policy(bits=2, rules={})), [images])
    assert find_nonfinite(model, images).startswith("no layer: parameters, outputs and gradients are finite")
    model[2].weight.grad = torch.full_like(model[2].weight, NAN)
    assert find_nonfinite(model, images) == "layer 2: the gradient of its weight has 144 of 144 values NaN"
    assert find_nonfinite(model, images * NAN) == (
        "quantizer 0.activation_quantizer: its output has 384 of 384 values NaN")
    model[2].activation_quantizer.steps.data[1] = INF
    assert find_nonfinite(model, images) == "quantizer 2.activation_quantizer: its steps has 1 of 3 values infinite"
    model[0].weight.data[0, 0, 0, 0] = NAN
    assert find_nonfinite(model, images) == "layer 0: its weight has 1 of 108 values NaN"
    assert model.training


GUARD_OF_ONE_RANK = """
import json, sys, torch
from nulsq.training.divergence import Diverged, DivergenceGuard
from nulsq.config.recipe import Guard
from nulsq.distributed import join_ranks
with join_ranks("cpu") as ranks:
    guard, bad = DivergenceGuard(Guard(every=4), 10, ranks), []
    for step in range(8):
        loss = float("nan") if (ranks.rank, step) == (1, 5) else 1.0 + ranks.rank
        try:
            guard.observe(step, torch.tensor(loss), torch.tensor(1.0))
        except Diverged as divergence:
            bad.append((step, divergence.step))
    open(sys.argv[1] + str(ranks.rank), "w").write(json.dumps([bad, guard.state_dict()]))
"""


def test_all_ranks_report_divergence_that_one_rank_sees(tmp_path):
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713",
                                "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen([sys.executable, "-c", GUARD_OF_ONE_RANK, str(tmp_path / "rank")], cwd=ROOT,
                                  env=environment | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert results[0] == results[1] == [[[7, 5]], [1.5, 5]]
