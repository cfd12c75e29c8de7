"""A run with CUDA graphs equals the run without: on a GPU, and on the CPU with cpu_graph.py in place of CUDA graphs."""

import subprocess
import sys

import pytest
import torch

import nulsq.train
from nulsq.run.directory import path_of
from nulsq.train import train
from nulsq.training import cuda_graph
from nulsq.training.divergence import Diverged, DivergenceGuard
from tests.conftest import ROOT
from tests.cpu_graph import note, on_the_cpu
from tests.runs import assert_same_state, last, numbers

HALVES = ["_gradients", "_update"]
EXACT = {"optim__coeff_qparm_lr": 2**-6}  # so that the learning rate is exact in float32
CASES = {  # overrides of the recipe, and the step halves that are recorded
    "nulsq": ({"optim__ema_decay": 0.9}, HALVES),
    "lcq-adamw": ({"quant__activation__quantizer": "lcq", "quant__weight__quantizer": "nulsq", "optim__accumulate": 2,
                   "optim__label_smoothing": 0.1, "optim__optimizer": "adamw", "optim__lr": 0.002,
                   "optim__qparm_optimizer": "sgd", "optim__clip_norm": 0.5}, HALVES),
    "minmax": ({"quant__activation__quantizer": "minmax", "quant__weight__quantizer": "uniq"}, HALVES),
    "bf16": ({"run__precision": "bf16", "quant__activation__quantizer": "apot", "optim__freeze_bn": True}, HALVES),
    "oscillating": ({"oscillation__dampening": 0.01, "oscillation__freeze_threshold": 0.1, "oscillation__start": 0.4,
                     "optim__epochs": 3}, [*HALVES, *HALVES]),
}
QUICK = ("nulsq", "minmax")  # the other cases are proofs


@pytest.fixture
def recorded(monkeypatch):
    """Names of the recorded functions, in order; learning rates are rounded to float32, as in a graph."""
    original = nulsq.training.setup.learning_rate
    monkeypatch.setattr(nulsq.training.setup, "learning_rate", lambda *args, **kwargs: torch.tensor(
        original(*args, **kwargs)).item())
    with on_the_cpu(monkeypatch) as names:
        yield names


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in CASES])
def test_replayed_steps_equal_plain_steps(name, short, float_run, recorded):
    overrides, expected = CASES[name]
    if name == "nulsq":
        overrides = overrides | {"distill__teacher": str(float_run), "distill__weight": 0.5}
    graphed, plain = (short(f"{kind}-{name}", **{"model__init_from": str(float_run), "optim__epochs": 2}
                            | EXACT | overrides, run__cuda_graph=kind == "graphed") for kind in ("graphed", "plain"))
    assert train(plain, quiet=True).status == "finished" and recorded == []
    assert train(graphed, quiet=True).status == "finished" and recorded == expected
    assert numbers(path_of(graphed)) == numbers(path_of(plain))
    assert_same_state(last(path_of(graphed)), last(path_of(plain)))


def test_resumed_graph_run_equals_uninterrupted_run(short, float_run, recorded, steps_done):
    whole, resumed = (short(name, model__init_from=str(float_run), run__cuda_graph=True, optim__epochs=3)
                      for name in ("graphed-whole", "graphed-resumed"))
    train(whole, quiet=True)
    assert train(resumed, quiet=True, stop=lambda: steps_done[-1] == 6).status == "saved"
    assert train(resumed, quiet=True).status == "finished"
    assert recorded == 3 * HALVES
    assert numbers(path_of(resumed)) == numbers(path_of(whole))
    assert_same_state(last(path_of(resumed)), last(path_of(whole)))


@pytest.mark.slow
def test_rollback_records_the_graphs_again(short, float_run, recorded, steps_done, monkeypatch):
    """After a rollback the state of the optimizers is in other memory."""
    original = DivergenceGuard.observe

    def observe(guard, step, *rest):
        original(guard, step, *rest)
        if step == 6:
            raise Diverged(6)

    monkeypatch.setattr(DivergenceGuard, "observe", observe)
    graphed, expected = (short(name, model__init_from=str(float_run), run__cuda_graph=name == "graphed-back",
                               optim__epochs=3, **EXACT) for name in ("graphed-back", "plain-back"))
    states = [train(recipe, quiet=True) for recipe in (graphed, expected)]
    assert [(state.status, state.skipped) for state in states] == 2 * [("finished", [6])]
    assert recorded == 2 * HALVES
    assert numbers(path_of(graphed)) == numbers(path_of(expected))
    assert_same_state(last(path_of(graphed)), last(path_of(expected)))


def test_recorded_steps_leave_gradients_for_the_diagnosis_of_divergence(short, float_run, recorded, monkeypatch):
    """Recorded steps store gradients in the parameters, like plain steps."""
    original = DivergenceGuard.observe

    def observe(guard, step, *rest):
        original(guard, step, *rest)
        if step >= 5:
            raise Diverged(step)

    def check_gradients(model, images):
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        return "quantizer"

    monkeypatch.setattr(DivergenceGuard, "observe", observe)
    monkeypatch.setattr(nulsq.train, "find_nonfinite", check_gradients)
    recipe = short("graphed-diverged", model__init_from=str(float_run), run__cuda_graph=True, optim__epochs=3,
                   guard__rollbacks=0)
    assert train(recipe, quiet=True).status == "diverged" and recorded == HALVES


def test_recording_rejects_reading_a_number(recorded):
    with pytest.raises(RuntimeError, match="a number is read"):
        cuda_graph.Recording(lambda x: x.sum().item(), (torch.ones(2),), torch.device("cpu"))


@pytest.mark.parametrize("overrides", [
    ["optim.clip_norm=1", "run.precision=bf16"],
    ["quant.weight.quantizer=nulsq", "quant.activation.quantizer=lcq", "optim.optimizer=adamw"],
    ["quant.weight.quantizer=uniq", "quant.activation.quantizer=apot", "oscillation.dampening=0.01",
     "oscillation.freeze_threshold=0.1"],
    ["quant.weight.quantizer=minmax", "quant.activation.quantizer=minmax"],
])
def test_step_uses_no_tensor_on_the_host(overrides):
    """No tensor is on the host or read there. The check changes torch, so it runs in a process of its own."""
    process = subprocess.run([sys.executable, "-m", "tests.fake_gpu", *overrides], cwd=ROOT, capture_output=True,
                             text=True, timeout=300)
    assert process.returncode == 0 and "on its device" in process.stdout, process.stderr[-3000:]


def test_cuda_graph_setting_is_ignored_with_a_warning_on_the_cpu(short, float_run, uninterrupted):
    """A recipe can be checked and tried on a machine without a GPU."""
    recipe = short("graphed-cpu", model__init_from=str(float_run), run__cuda_graph=True, optim__epochs=3)
    with pytest.warns(UserWarning, match="one rank on a GPU only; this run continues without graphs .1 on cpu"):
        train(recipe, quiet=True)
    assert numbers(path_of(recipe)) == numbers(uninterrupted)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["nulsq", "lcq-adamw", "oscillating"])
def test_graph_run_equals_plain_run_on_a_gpu(name, compile, short, float_run, monkeypatch):
    """Losses agree up to the rounding of learning rates."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    recorded = note(monkeypatch, "cuda", cuda_graph.RECORDERS["cuda"])
    overrides, expected = CASES[name]
    graphed, plain = (short(f"{kind}-{name}-{compile}", **{"model__init_from": str(float_run), "optim__epochs": 3}
                            | overrides | {"run__device": "cuda", "run__compile": compile, "optim__lr": 0.001},
                            run__cuda_graph=kind == "graphed") for kind in ("graphed", "plain"))
    for recipe in (plain, graphed):
        assert train(recipe, quiet=True).status == "finished"
    assert recorded == expected
    losses = torch.tensor([[line["train_loss"], line["val_loss"]] for recipe in (graphed, plain)
                           for line in numbers(path_of(recipe))])
    torch.testing.assert_close(*losses.chunk(2), rtol=0.01, atol=0.0)
