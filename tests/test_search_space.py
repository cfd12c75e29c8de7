"""Searches in YAML and the stratified scheduler, without a cluster."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nulsq.errors import InputError
from tune.queue import all_trials
from tune.space import Sampler, load_search, rungs, studies

pytest.importorskip("ray")
from tune.ray_backend.scheduler import CONTINUE, STOP, StratifiedAsha  # noqa: E402
from tune.ray_backend.trial_protocol import TrialSettings  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("in_the_checkout")
DEMO = ROOT / "configs/search/demo.yaml"


def test_studies_take_turns_and_share_their_samples():
    search = load_search(DEMO, ["studies.bits.values=[2, 4]", "trials=3"])
    names, trials = [study.name for study in studies(search)], all_trials(search)
    assert names == ["lsq_nulsq_2", "lsq_nulsq_4", "lsq_lsq_2", "lsq_lsq_4"]
    assert [trial.study for trial in trials] == names * 3
    for number in range(3):
        drawn = [trial.drawn for trial in trials if trial.number == number]
        assert all(values == drawn[0] for values in drawn)
    assert len({trial.drawn["lr"] for trial in trials}) == 3


def test_sample_does_not_depend_on_the_number_of_trials():
    small = load_search(DEMO, ["trials=2"])
    large = load_search(DEMO, ["trials=9", "space.extra={key: optim.momentum, sample: uniform, low: 0.8, high: 0.95}"])
    samples = {trial.key: trial.drawn for trial in all_trials(large)}
    for trial in all_trials(small):
        assert all(samples[trial.key][name] == value for name, value in trial.drawn.items())


def test_samplers_stay_in_their_range():
    log, flat = Sampler("a", "loguniform", 1e-4, 1e-1), Sampler("a", "uniform", 2, 3)
    assert log.quantile(0) == pytest.approx(1e-4) and log.quantile(0.5) == pytest.approx(10**-2.5)
    assert flat.quantile(0.25) == 2.25
    assert [Sampler("a", "choice", values=["x", "y", "z"]).quantile(u) for u in (0, 0.4, 0.99)] == ["x", "y", "z"]


def test_rungs_are_below_the_last_epoch():
    assert rungs(90, 5, 3) == [5, 15, 45] and rungs(4, 1, 2) == [1, 2] and rungs(3, 3, 2) == []


@pytest.mark.parametrize(("override", "message"), [
    ("space.lr.key=optim.lrr", "space.lr: .*optim.lrr.*Did you mean: 'lr'"),
    ("studies.bits.values=[2, 12]", "quant.bits = 12, allowed"),
    ("space.lr.low=0", "above 0"),
    ("space.lr.low=0.5", "needs low < high"),
    ("space.lr.sample=normal", "expected one of"),
    ("trial=3", "Did you mean: 'trials'"),
    ("grace=10", "grace = 10, but a trial has only 4 epochs"),
    ("metric=top1", "metric: .*expected one of"),
    ("recipe=configs/recipes/digits/w2a3.yaml", "no file .*w2a2.yaml"),
    ("space.extra={key: quant.bits, sample: choice, values: [2]}", "quant.bits is set by two entries"),
    ("overrides={data.holdout: none}", "ranks trials on the holdout"),
    ("overrides={optim.lr: 0.1}", "optim.lr is set by two entries"),
    ("overrides={run.dir: x}", "run.dir is set for each trial"),
    ("space.lr.key=data.holdout_seed", "data.holdout_seed cannot be sampled"),
    ("studies.bits.values=[2, 2]", "two studies would be called lsq_nulsq_2"),
    ("studies.bits.cases={two: {quant.bits: 2}}", "studies.bits needs a key and values.* or cases"),
    ("points={mine: {lr: 0.01}}", "points.mine: coeff_qparm_lr is missing"),
    ("points={mine: {lr: 0.01, coeff_qparm_lr: 0.01, qparm_wd: 1e-4, wd: 0}}", "points.mine: wd is no sampler"),
    ("points={mine: {lr: 7, coeff_qparm_lr: 0.01, qparm_wd: 1e-4}}", "points.mine.lr = 7, allowed: 0.005 to 0.1"),
    ("searcher=tpee", "searcher: .*expected one of"),
    ("name=a~b", "without ~ and /"),
    ("nodes=2", "nodes = 2, allowed with address = local: 1, a local Ray is one node"),
])
def test_invalid_search_is_an_error(override, message):
    with pytest.raises(InputError, match=message):
        load_search(DEMO, [override])


# ---- the scheduler


def scheduler(tmp_path, epochs=9, names=("good", "bad"), grace=1, reduction=3):
    return StratifiedAsha(dict.fromkeys(names, epochs), grace=grace, reduction=reduction, metric="val_top1",
                          mode="max", file=tmp_path / "rungs")


def test_studies_do_not_eliminate_each_other(tmp_path):
    """Decisions in a study equal those in a search of that study alone, however much better the other study is."""
    draw = random.Random(0)
    scores = {name: [base + draw.random() for _ in range(12)] for name, base in (("good", 90), ("bad", 10))}
    both = scheduler(tmp_path)
    together = {name: [] for name in scores}
    for number in range(12):
        for name in scores:
            together[name].append(both.decide(name, f"{name}/{number}", 1, scores[name][number]))
    for name in scores:
        (tmp_path / name).mkdir()
        alone = scheduler(tmp_path / name, names=(name,))
        assert [alone.decide(name, f"{name}/{number}", 1, scores[name][number]) for number in range(12)] == \
            together[name]
    assert STOP in together["bad"] and CONTINUE in together["bad"]


def test_shared_rungs_stop_the_worse_study(tmp_path):
    mixed = scheduler(tmp_path, names=("all",))
    answers = [[mixed.decide("all", f"{name}/{i}", 1, base + i) for name, base in (("good", 90), ("bad", 10))]
               for i in range(6)]
    assert [bad for _, bad in answers] == [STOP] * 6


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_nonfinite_score_stops_the_trial_and_enters_no_rung(tmp_path, score):
    asha = scheduler(tmp_path)
    asha.decide("good", "0", 1, 50.0)
    assert asha.decide("good", "1", 1, score) == STOP
    assert asha.decide("good", "2", 1, 51.0) == CONTINUE
    assert list(json.loads(asha.file.read_text())["rungs"]["good"][-1][1]) == ["0", "2"]


def test_trial_is_not_stopped_at_its_last_epoch(tmp_path):
    asha = scheduler(tmp_path, epochs=3)
    asha.decide("good", "0", 1, 90.0)
    assert asha.decide("good", "1", 3, 1.0) == CONTINUE


def test_restored_scheduler_decides_like_an_uninterrupted_one(tmp_path):
    import pickle
    draw = random.Random(1)
    results = [("good", str(number), epoch, 50 + number + epoch + draw.random()) for epoch in (1, 3)
               for number in range(10)]
    draw.shuffle(results)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    uninterrupted, restored = scheduler(tmp_path / "a"), scheduler(tmp_path / "b")
    saved = pickle.dumps(restored)  # as Tune does, once, before the first result
    expected, actual = [], []
    for i, result in enumerate(results):
        expected.append(uninterrupted.decide(*result))
        if i == 8:
            restored = pickle.loads(saved)
        actual.append(restored.decide(*result))
    assert expected == actual and STOP in expected


def test_stopped_trial_that_runs_again_stops_at_the_same_epoch(tmp_path):
    asha = scheduler(tmp_path, epochs=4)
    for number, score in enumerate([90, 91, 92]):
        assert asha.decide("good", str(number), 1, score) == CONTINUE
        asha.decide("good", str(number), 3, score)
    assert asha.decide("good", "3", 1, 95) == CONTINUE
    assert asha.decide("good", "3", 3, 10) == STOP
    assert [asha.decide("good", "3", epoch, score) for epoch, score in ((1, 95), (2, 50), (3, 99), (4, 99))] == \
        [CONTINUE, CONTINUE, STOP, STOP]  # also at its last epoch


def test_reporting_the_epochs_of_a_continued_trial_again_changes_nothing(tmp_path):
    asha = scheduler(tmp_path)
    for number, score in enumerate([90, 80, 95]):
        asha.decide("good", str(number), 1, score)
    before = asha.file.read_text()
    answers = [asha.decide("good", str(number), 1, score) for number, score in enumerate([90, 80, 95])]
    assert answers == [CONTINUE, STOP, CONTINUE] and asha.file.read_text() == before


def test_loss_is_ranked_downwards(tmp_path):
    asha = StratifiedAsha({"s": 9}, grace=1, reduction=3, metric="val_loss", mode="min", file=tmp_path / "rungs")
    assert asha.decide("s", "0", 1, 0.5) == CONTINUE
    assert asha.decide("s", "1", 1, 0.9) == STOP
    assert asha.decide("s", "2", 1, 0.1) == CONTINUE


def test_diverged_trial_stops_and_enters_no_rung(tmp_path):
    asha = scheduler(tmp_path)
    settings = TrialSettings(study="good", number=0, key="good/000", repeat=0, stratum="good", overrides={},
                             metric="val_top1", cpus=1, gpus=0, workers=1, search_directory=str(tmp_path),
                             working_directory=".")
    assert TrialSettings.from_config(settings.to_config()) == settings
    trial = SimpleNamespace(config=settings.to_config())
    assert asha.on_trial_result(None, trial, {"epoch": 1, "val_top1": 0.0, "diverged": True}) == STOP
    assert json.loads(asha.file.read_text())["rungs"] == {}


# ---- functions that are called in a subprocess


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", f"import os, sys\nfrom tune.subprocess_call import run_in_subprocess\n"
                                                 f"{code}"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_function_runs_in_a_subprocess_and_prints_to_stderr():
    completed = run("print(run_in_subprocess(os.getpid) != os.getpid(), run_in_subprocess(os.path.join, 'a', 'b'))\n"
                    "run_in_subprocess(print, 'a download')\n"
                    "import importlib; run_in_subprocess(importlib.reload, 1)")
    assert completed.stdout == "True a/b\n"  # stdout stays free of it, for programs that read stdout
    assert completed.stderr.startswith("a download\n")
    # the traceback of the subprocess is shown, too
    assert "TypeError: reload() argument must be a module" in completed.stderr and "in reload" in completed.stderr


def test_subprocess_has_its_own_session():
    """Ctrl-C in the terminal reaches the parent alone, which then ends the child."""
    completed = run("print(run_in_subprocess(os.getsid, 0) != os.getsid(0))")
    assert completed.stdout == "True\n"


def test_invalid_input_and_a_dead_subprocess_are_different_errors():
    completed = run("from nulsq.config import load_recipe\n"
                    "try: run_in_subprocess(load_recipe, 'nowhere.yaml')\n"
                    "except Exception as error: print(type(error).__name__, error)\n"
                    "run_in_subprocess(os._exit, 7)")
    assert completed.stdout == "InputError no file nowhere.yaml\n"
    assert "RuntimeError: the process that called posix._exit ended with exit code 7" in completed.stderr


def test_error_that_cannot_be_unpickled_keeps_its_text_and_traceback():
    completed = run("from tests.searches import fail\nrun_in_subprocess(fail, 'a', 'b')")
    assert "RuntimeError: UnpicklableError: a and b" in completed.stderr and "in fail" in completed.stderr


def test_signal_during_the_call_ends_both_processes(tmp_path):
    """The child removes its temporary file before it ends."""
    code = ("import signal, sys\nfrom tests.searches import linger\n"
            "from tune.subprocess_call import run_in_subprocess\n"
            "def interrupt(*_): raise KeyboardInterrupt\n"
            "signal.signal(signal.SIGUSR1, interrupt)\n"
            "try: run_in_subprocess(linger, sys.argv[1])\n"
            "except KeyboardInterrupt: sys.exit(99)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 99 and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_function_runs_in_this_process_if_torch_is_loaded():
    completed = run("import torch\nprint(run_in_subprocess(os.getpid) == os.getpid())")
    assert completed.stdout == "True\n"
