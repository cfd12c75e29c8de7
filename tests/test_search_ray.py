"""A whole search on a real local Ray: studies, early stopping, results, and what a second call does."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nulsq import checkpoint
from nulsq.config import to_yaml
from nulsq.optim import learning_rate
from nulsq.run_directory import TIMES, path_of, read_metrics, read_outcome, read_recipe
from nulsq.train import train
from tests.conftest import FLOAT
from tune import journal

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def search_file(short, tmp_path_factory) -> Path:
    """Trials that start from a network that has learned something, and a last draw that harms it (lr 3e-4, 6e-4,
    0.087): from chance trials tie, and ASHA stops none that ties with those before it, or betters them."""
    folder = tmp_path_factory.mktemp("search")
    learned = short("learned", **FLOAT, optim__epochs=6, data__subset=1024)
    assert train(learned, quiet=True).outcome == "finished"
    recipe = short("trial", model__init_from=str(path_of(learned)), optim__epochs=4)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "tiny.yaml").write_text(f"""
recipe: {folder}/recipe.yaml
dir: {folder}/out
studies:
  activation: {{key: quant.activation.quantizer, values: [nulsq, lsq]}}
  bits: {{key: quant.bits, values: [2, 4]}}
space:
  lr: {{key: optim.lr, sample: loguniform, low: 1e-4, high: 0.1}}
trials: 3
repeats: 1
seed: 39
reduction: 2
""")
    return folder / "tiny.yaml"


def search(*arguments, timeout=500) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tune.search", *map(str, arguments)], cwd=ROOT, timeout=timeout,
                          capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(scope="module")
def done(search_file) -> tuple[Path, str]:
    ended = search(search_file)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return search_file.parent / "out", ended.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(search_file, tmp_path):
    ended = search(search_file, "--dry-run", f"dir={tmp_path}/never")
    assert ended.returncode == 0
    assert "4 studies of 3 trials" in ended.stdout and "rungs at epochs 1, 2 of 4" in ended.stdout
    assert "budget: at most 64 epochs" in ended.stdout
    assert not (tmp_path / "never").exists()


def test_every_trial_ran_and_some_were_stopped(done):
    out, _ = done
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert len(rows) == 16 and {row["status"] for row in rows} == {"finished", "stopped"}
    for row in rows:
        lines = read_metrics(Path(row["run"]))
        assert len(lines) == int(row["epochs"]) and float(row["val_top1"]) == lines[-1]["val_top1"]
        # The schedule keeps its full length: a rung stops a trial, it never compresses it.
        full = learning_rate(3, steps=16, warmup_steps=0, peak=float(row["optim.lr"]), warmup_lr=0)
        assert lines[0]["lr"] == pytest.approx(full)
        assert (row["status"] == "finished") == (len(lines) == 4)
        assert len(lines) in (1, 2, 4)  # rungs at 1 and 2
        # What nobody goes on with costs no disk; what may be evaluated or looked at is kept.
        assert (row["status"] == "finished") == bool(list(Path(row["run"]).glob("checkpoints/*.pt")))
        bits = float(row["quant.bits"])
        assert bits < float(row["average_bits"]) < bits + 2  # the 8-bit edges are in it


def test_each_finalist_is_trained_again_with_another_seed(done):
    out, printed = done
    rows = list(csv.DictReader((out / "trials.csv").open()))
    again = {row["study"]: row for row in rows if row["repeat"] == "1"}
    assert set(again) == {"nulsq_2", "nulsq_4", "lsq_2", "lsq_4"}
    for study, row in again.items():
        first = max((each for each in rows if each["study"] == study and each["repeat"] == "0"),
                    key=lambda each: (int(each["epochs"]), float(each["val_top1"])))
        assert row["number"] == first["number"] and row["optim.lr"] == first["optim.lr"]
        assert row["source"] == "repeat" and row["status"] == "finished"
        seeds = [read_recipe(Path(each["run"])).run.seed for each in (first, row)]
        assert seeds[1] == seeds[0] + 1
    assert "(2 seeds" in printed


def test_the_journal_has_every_trial_and_every_result_once(done):
    out, _ = done
    trials = journal.read(out)
    assert len({trial.key for trial in trials}) == len(trials) == 16
    # studies take turns: among the first trials each has its first, then each its second
    assert [trial.number for trial in trials[:12]] == [0] * 4 + [1] * 4 + [2] * 4
    _every_result_once(out)


def test_status_from_another_terminal_shows_where_the_search_stands(done):
    out, _ = done
    ended = subprocess.run([sys.executable, "-m", "tune.status", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and f"{out}: finished" in ended.stdout
    lines = {line.split()[0]: line.split() for line in ended.stdout.splitlines()[2:-1]}
    rows = list(csv.DictReader((out / "trials.csv").open()))
    for study, words in lines.items():
        own = [row for row in rows if row["study"] == study]
        assert words[1:5] == [str(sum(row["status"] == state for row in own)) for state in ("finished", "stopped")] + \
            ["0", "0"]
        assert words[-1] == f"{sum(int(row['epochs']) for row in own)}/16"
    assert len(lines) == 4


def test_the_rungs_hold_each_trials_own_scores(done):
    out, _ = done
    rungs = json.loads((out / "rungs").read_text())
    rows = {f"{row['study']}/{int(row['number']):03d}": row for row in csv.DictReader((out / "trials.csv").open())
            if row["repeat"] == "0"}
    assert {key for key, row in rows.items() if row["status"] == "stopped"} == set(rungs["stopped"])
    for key, row in rows.items():
        lines = read_metrics(Path(row["run"]))
        for milestone, values in rungs["rungs"][row["study"]]:
            if milestone < 4 and len(lines) >= milestone:
                assert values[key] == lines[milestone - 1]["val_top1"]


def test_each_study_has_a_leaderboard_a_winner_on_test_and_a_recipe_for_it(done):
    out, printed = done
    for study in ("nulsq_2", "nulsq_4", "lsq_2", "lsq_4"):
        assert f"study {study}: winner's test top-1" in printed
        assert (out / "studies" / study / "best.yaml").is_file()
    assert len(list(out.glob("trials/*/*/test.json"))) == 8  # the winners with both seeds, nobody else
    assert (out / "report" / "index.html").is_file()
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in (out / "report").glob("*.png"))


def test_best_yaml_retrains_the_winner_to_the_same_numbers(done, tmp_path):
    from nulsq.config import load_recipe
    out, _ = done
    row = max((row for row in csv.DictReader((out / "trials.csv").open())
               if row["study"] == "nulsq_2" and row["repeat"] == "0"),
              key=lambda row: (int(row["epochs"]), float(row["val_top1"])))
    recipe = load_recipe(out / "studies" / "nulsq_2" / "best.yaml", {"run.root": str(tmp_path)})
    assert train(recipe, quiet=True).outcome == "finished"
    before, after = ([{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path)]
                     for path in (Path(row["run"]), path_of(recipe)))
    assert before == after


def test_a_second_call_shows_the_results_and_trains_nothing(search_file, done):
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/*.json*")}
    ended = search(search_file)
    assert ended.returncode == 0 and "study nulsq_2: winner's test top-1" in ended.stdout
    assert "Ray is up" not in ended.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/*.json*")}


def test_another_search_in_the_same_directory_is_an_error(search_file, done):
    ended = search(search_file, "space.lr.high=0.5")
    assert ended.returncode == 2 and "holds another search (space.lr.high 0.1 -> 0.5)" in ended.stderr
    ended = search(search_file, "trials=5")
    assert ended.returncode == 2 and "say --extend 2, with trials=3" in ended.stderr


@pytest.mark.parametrize("number", [
    pytest.param(signal.SIGUSR1, id="SIGUSR1"),
    pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.long),
    pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long),
    pytest.param(signal.SIGKILL, id="SIGKILL", marks=pytest.mark.slow)])
def test_an_interrupted_search_is_continued(search_file, tmp_path, number):
    """The driver gets a signal while trials run; the same command ends all trials, none from zero again, and every
    rung holds the score of its own epoch."""
    command = [sys.executable, "-m", "tune.search", str(search_file), f"dir={tmp_path}/out", "trials=2",
               "repeats=0", "studies.bits.values=[2]"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("out/trials/*/*/metrics.jsonl")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(number)
        code = process.wait(timeout=120)
        assert code == (-9 if number == signal.SIGKILL else 99), (tmp_path / "log").read_text()[-3000:]
    _wait_for_orphans(tmp_path / "out")
    kept = {path.parent: checkpoint.load(newest)["epoch"] for path in tmp_path.glob("out/trials/*/*/metrics.jsonl")
            if (newest := checkpoint.newest(path.parent))}
    lines = {path: read_metrics(path)[:epoch] for path, epoch in kept.items()}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    for path, before in lines.items():
        assert read_metrics(path)[:len(before)] == before  # continued, not trained anew: even the times are the same
    rungs = json.loads((tmp_path / "out" / "rungs").read_text())["rungs"]
    for study, recorded in rungs.items():
        for milestone, values in recorded:
            for key, score in values.items():
                if milestone < 4:
                    trained = read_metrics(tmp_path / "out" / "trials" / key)
                    assert score == trained[milestone - 1]["val_top1"], (study, key, milestone)
    _every_result_once(tmp_path / "out")
    outcomes = [read_outcome(path.parent)["outcome"] for path in tmp_path.glob("out/trials/*/*/recipe.yaml")]
    assert len(outcomes) == 4 and "finished" in outcomes
    if number != signal.SIGUSR1:
        return
    # ... and a finished search is extended: more trials, the ones before stay as they are
    before = {path: path.read_text() for path in tmp_path.glob("out/trials/*/*/metrics.jsonl")}
    ended = subprocess.run([*command, "--extend", "1"], cwd=ROOT, capture_output=True, text=True, timeout=400,
                           env=environment)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    after = {path: path.read_text() for path in tmp_path.glob("out/trials/*/*/metrics.jsonl")}
    assert len(after) == 6 and before.items() <= after.items()
    assert "2 studies of 3 trials" in ended.stdout


def test_a_trial_that_dies_does_not_end_the_search(search_file, tmp_path):
    """Its process is killed, as by the system when memory runs out: it is tried again, then left, with its reason."""
    ended = search(search_file, f"dir={tmp_path}/out", "trials=1", "repeats=0", "studies.bits.values=[2]",
                   "studies.activation.values=[lsq, tests.dying]", "overrides={optim.epochs: 2}")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    rows = {row["study"]: row for row in csv.DictReader((tmp_path / "out" / "trials.csv").open())}
    assert rows["lsq_2"]["status"] == "finished" and rows["tests.dying_2"]["epochs"] == "0"
    assert rows["tests.dying_2"]["status"] == "failed"
    happened = [event["event"] for event in journal.events(tmp_path / "out") if event["key"] == "tests.dying_2/000"]
    assert happened == ["start", "retry", "error", "end"] or happened == ["start", "retry", "end", "error"]
    assert "crashed and is tried again" in ended.stdout and "study tests.dying_2: no trial" in ended.stdout
    # One that diverges costs the search nothing but its epochs, and has no place in the ranking.
    ended = search(search_file, f"dir={tmp_path}/diverges", "trials=2", "repeats=0", "studies.bits.values=[2]",
                   "studies.activation.values=[lsq]", "overrides={optim.epochs: 2, guard.rollbacks: 0}",
                   "concurrent=1", "space.lr.high=1e13", "points={sane: {lr: 0.01}, mad: {lr: 1e12}}")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "diverges" / "trials.csv").open()))
    assert [row["status"] for row in rows] == ["finished", "diverged"]
    assert not list((tmp_path / "diverges").glob("trials/*/001/checkpoints/*.pt"))
    assert read_outcome(Path(rows[1]["run"]))["outcome"] == "diverged"
    # One at a time, as it was told: the second was not begun before the first had ended.
    order = [(event["event"], event["key"]) for event in journal.events(tmp_path / "diverges")
             if event["event"] in ("start", "end")]
    assert order == [(what, f"lsq_2/{number:03d}") for number in (0, 1) for what in ("start", "end")]


@pytest.mark.long
def test_a_search_whose_time_is_used_up_shows_what_it_has_and_goes_on_with_more(search_file, tmp_path):
    arguments = [search_file, f"dir={tmp_path}/out", "trials=1", "repeats=0", "studies.bits.values=[2]",
                 "studies.activation.values=[lsq]"]
    for _ in range(2):  # the second time nothing is left of it
        ended = search(*arguments, "hours=0.0001")
        assert "the time budget of 0.0001 hours is used up" in ended.stdout
        assert ended.returncode == 1 and "no trial has reached its end yet" in ended.stdout
        assert not (tmp_path / "out" / "finished").exists()  # nor has anything seen the test images
    ended = search(*arguments, "--extend", "1")
    assert ended.returncode == 2 and "has not finished" in ended.stderr
    ended = search(*arguments, "hours=1")
    assert ended.returncode == 0 and "study lsq_2: winner's test top-1" in ended.stdout, ended.stdout + ended.stderr


def _every_result_once(out: Path) -> None:
    results = [(event["key"], event["epoch"]) for event in journal.events(out) if event["event"] == "result"]
    trained = [(trial.key, line["epoch"]) for trial in journal.read(out)
               for line in read_metrics(out / "trials" / trial.key)]
    assert sorted(results) == sorted(trained)


def _wait_for_orphans(out: Path) -> None:
    """After SIGKILL of the driver Ray's workers notice by themselves; they hold their run directories until then."""
    import fcntl
    deadline = time.monotonic() + 120
    for lock in out.glob("trials/*/*/lock"):
        with lock.open("a") as file:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.2)
