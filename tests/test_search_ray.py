"""A whole search on a real local Ray: studies, early stopping, results, and what a second call does."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nulsq.config import to_yaml
from nulsq.run_directory import read_metrics, read_outcome

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def search_file(short, float_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    recipe = short("trial", model__init_from=str(float_run), optim__epochs=4)
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
    assert "budget: at most 48 epochs" in ended.stdout
    assert not (tmp_path / "never").exists()


def test_every_trial_ran_and_some_were_stopped(done):
    out, _ = done
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert len(rows) == 12 and {row["status"] for row in rows} == {"finished", "stopped"}
    for row in rows:
        lines = read_metrics(Path(row["run"]))
        assert len(lines) == int(row["epochs"]) and float(row["val_top1"]) == lines[-1]["val_top1"]
        # The schedule keeps its full length: a rung stops a trial, it never compresses it.
        assert lines[0]["lr"] == pytest.approx(float(row["optim.lr"]) * 0.8705, rel=1e-3)
        assert (row["status"] == "finished") == (len(lines) == 4)


def test_a_stopped_trial_was_worse_than_others_of_its_own_study(done):
    out, _ = done
    rungs = json.loads((out / "rungs").read_text())
    assert rungs["stopped"]
    for key, epoch in rungs["stopped"].items():
        study = key.split("/")[0]
        recorded = next(values for milestone, values in rungs["rungs"][study] if milestone == epoch)
        assert recorded[key] < max(recorded.values())
        assert all(other.startswith(f"{study}/") for other in recorded)


def test_each_study_has_a_leaderboard_a_winner_on_test_and_a_recipe_for_it(done):
    out, printed = done
    for study in ("nulsq_2", "nulsq_4", "lsq_2", "lsq_4"):
        assert f"study {study}: winner's test top-1" in printed
        assert (out / "studies" / study / "best.yaml").is_file()
    assert len(list(out.glob("trials/*/*/test.json"))) == 4  # the winners, nobody else
    assert (out / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_best_yaml_retrains_the_winner_to_the_same_numbers(done, tmp_path):
    from nulsq.config import load_recipe
    from nulsq.run_directory import path_of
    from nulsq.train import train
    out, _ = done
    row = max((row for row in csv.DictReader((out / "trials.csv").open()) if row["study"] == "nulsq_2"),
              key=lambda row: (int(row["epochs"]), float(row["val_top1"])))
    recipe = load_recipe(out / "studies" / "nulsq_2" / "best.yaml", {"run.root": str(tmp_path)})
    assert train(recipe, quiet=True).outcome == "finished"
    times = {"images_per_second", "wait_share", "seconds"}
    before, after = ([{k: v for k, v in line.items() if k not in times} for line in read_metrics(path)]
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


def test_an_interrupted_search_is_continued(search_file, tmp_path):
    """SIGINT while trials run: saved and left with 99; the same command ends all trials, none from zero again."""
    import signal
    import time
    command = [sys.executable, "-m", "tune.search", str(search_file), f"dir={tmp_path}/out", "trials=2",
               "studies.bits.values=[2]"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("out/trials/*/*/metrics.jsonl")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == 99, (tmp_path / "log").read_text()[-3000:]
    kept = {path: path.read_text() for path in tmp_path.glob("out/trials/*/*/metrics.jsonl")}
    assert kept
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    for path, text in kept.items():
        assert path.read_text().startswith(text)  # continued, not trained anew
    outcomes = [read_outcome(path.parent)["outcome"] for path in tmp_path.glob("out/trials/*/*/recipe.yaml")]
    assert len(outcomes) == 4 and "finished" in outcomes
