"""Faults of a search on a real local Ray: interruptions, trials that die, a time budget that is used up."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nulsq.files import is_locked
from nulsq.run import checkpoint
from nulsq.run.directory import read_metrics
from nulsq.run.status import read_outcome
from tests.searches import assert_each_result_once, search
from tune.store import journal

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [
    pytest.param(signal.SIGUSR1, id="SIGUSR1"),
    pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.long),
    pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long),
    pytest.param(signal.SIGKILL, id="SIGKILL", marks=pytest.mark.long)])
def test_interrupted_search_resumes(search_file, tmp_path, signal_number):
    """The driver receives a signal while trials run. The same command then completes all trials without restarting
    any of them, and every rung holds the scores of its own epoch."""
    command = [sys.executable, "-m", "tune.search", str(search_file), f"dir={tmp_path}/out", "trials=2",
               "repeats=0", "studies.bits.values=[2]"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("out/trials/*/*/metrics.jsonl")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        # The driver may wait for trials for days, so it must not load torch.
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal_number)
        code = process.wait(timeout=120)
        assert code == (-9 if signal_number == signal.SIGKILL else 99), (tmp_path / "log").read_text()[-3000:]
    _wait_for_orphans(tmp_path / "out")
    epochs = {path.parent: checkpoint.load(newest)["epoch"] for path in tmp_path.glob("out/trials/*/*/metrics.jsonl")
            if (newest := checkpoint.newest(path.parent))}
    lines = {path: read_metrics(path)[:epoch] for path, epoch in epochs.items()}
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    for path, before in lines.items():
        assert read_metrics(path)[:len(before)] == before  # resumed, not trained again: even the times are equal
    rungs = json.loads((tmp_path / "out" / "rungs").read_text())["rungs"]
    for study, recorded in rungs.items():
        for milestone, values in recorded:
            for key, score in values.items():
                if milestone < 4:
                    trained = read_metrics(tmp_path / "out" / "trials" / key)
                    assert score == trained[milestone - 1]["val_top1"], (study, key, milestone)
    assert_each_result_once(tmp_path / "out")
    outcomes = [read_outcome(path.parent)["outcome"] for path in tmp_path.glob("out/trials/*/*/recipe.yaml")]
    assert len(outcomes) == 4 and "finished" in outcomes
    if signal_number != signal.SIGUSR1:
        return
    # A finished search is extended: it gets more trials, and the earlier ones are unchanged.
    before = {path: path.read_text() for path in tmp_path.glob("out/trials/*/*/metrics.jsonl")}
    completed = subprocess.run([*command, "--extend", "1"], cwd=ROOT, capture_output=True, text=True, timeout=400,
                               env=environment)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    after = {path: path.read_text() for path in tmp_path.glob("out/trials/*/*/metrics.jsonl")}
    assert len(after) == 6 and before.items() <= after.items()
    assert "2 studies of 3 trials" in completed.stdout


@pytest.mark.slow
def test_search_continues_after_a_trial_dies(search_file, tmp_path):
    """Its process is killed, as when memory runs out. It is tried again and then fails, and the reason is recorded."""
    completed = search(search_file, f"dir={tmp_path}/out", "trials=1", "repeats=0", "studies.bits.values=[2]",
                       "studies.activation.values=[lsq, tests.dying]", "overrides={optim.epochs: 2}")
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    rows = {row["study"]: row for row in csv.DictReader((tmp_path / "out" / "trials.csv").open())}
    assert rows["lsq_2"]["status"] == "finished" and rows["tests.dying_2"]["epochs"] == "0"
    assert rows["tests.dying_2"]["status"] == "failed"
    events = [event["event"] for event in journal.events(tmp_path / "out") if event["key"] == "tests.dying_2/000"]
    assert events == ["start", "retry", "error", "end"] or events == ["start", "retry", "end", "error"]
    assert "crashed and is tried again" in completed.stdout and "study tests.dying_2: no trial" in completed.stdout
    # A trial that diverges ends early and is not ranked.
    completed = search(search_file, f"dir={tmp_path}/diverges", "trials=2", "repeats=0", "studies.bits.values=[2]",
                       "studies.activation.values=[lsq]", "overrides={optim.epochs: 2, guard.rollbacks: 0}",
                       "concurrent=1", "space.lr.high=1e13", "points={sane: {lr: 0.01}, mad: {lr: 1e12}}")
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "diverges" / "trials.csv").open()))
    assert [row["status"] for row in rows] == ["finished", "diverged"]
    assert not list((tmp_path / "diverges").glob("trials/*/001/checkpoints/*.pt"))
    assert read_outcome(Path(rows[1]["run"]))["outcome"] == "diverged"
    # concurrent=1: the second trial starts after the first has ended.
    order = [(event["event"], event["key"]) for event in journal.events(tmp_path / "diverges")
             if event["event"] in ("start", "end")]
    assert order == [(kind, f"lsq_2/{number:03d}") for number in (0, 1) for kind in ("start", "end")]


@pytest.mark.long
def test_trial_refused_by_a_busy_process_starts_elsewhere(search_file, tmp_path, monkeypatch):
    """A stopped trial takes six seconds to end, but its process has to take the next trial after one second."""
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "1")
    completed = search(search_file, f"dir={tmp_path}/out", "concurrent=1", "repeats=0", "studies.bits.values=[2]",
                       "studies.activation.values=[tests.lingering]")
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    assert {row["status"] for row in rows} == {"finished", "stopped"} and len(rows) == 3
    refused = [event for event in journal.events(tmp_path / "out") if event["event"] == "error"]
    assert refused and all("is still ending the one before, after 1 s" in event["reason"] for event in refused)
    assert_each_result_once(tmp_path / "out")


@pytest.mark.long
def test_search_out_of_time_shows_its_results_and_resumes_with_more(search_file, tmp_path):
    arguments = [search_file, f"dir={tmp_path}/out", "trials=1", "repeats=0", "studies.bits.values=[2]",
                 "studies.activation.values=[lsq]"]
    for _ in range(2):  # the second time the budget is used up already
        completed = search(*arguments, "hours=0.0001")
        assert "the time budget of 0.0001 hours is used up" in completed.stdout
        assert completed.returncode == 1 and "no trial has reached its end yet" in completed.stdout
        assert not (tmp_path / "out" / "finished").exists()  # and nothing was evaluated on the test images
    completed = search(*arguments, "--extend", "1")
    assert completed.returncode == 2 and "has not finished" in completed.stderr
    completed = search(*arguments, "hours=1")
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "study lsq_2: winner's test top-1" in completed.stdout


def _wait_for_orphans(out: Path) -> None:
    """After SIGKILL of the driver, Ray's workers end by themselves; until then they hold the locks of their runs."""
    deadline = time.monotonic() + 120
    for file in out.glob("trials/*/*/lock"):
        while is_locked(file) and time.monotonic() < deadline:
            time.sleep(0.2)
