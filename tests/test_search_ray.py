"""A complete search on a real local Ray: studies, early stopping, results, and a second call of the same command."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nulsq.run.directory import TIMES, path_of, read_metrics, read_recipe
from nulsq.train import train
from nulsq.training.optim import learning_rate
from tests.runs import numbers
from tests.searches import assert_each_result_once, search
from tune.store import journal

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]  # the first test waits for a whole search
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished_search(search_file) -> tuple[Path, str]:
    completed = search(search_file)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    return search_file.parent / "out", completed.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(search_file, tmp_path):
    completed = search(search_file, "--dry-run", f"dir={tmp_path}/never")
    assert completed.returncode == 0
    assert "4 studies of 3 trials" in completed.stdout and "rungs at epochs 1, 2 of 4" in completed.stdout
    assert "budget: at most 64 epochs" in completed.stdout
    assert not (tmp_path / "never").exists()


def test_every_trial_ran_and_some_were_stopped(finished_search):
    out, _ = finished_search
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert len(rows) == 16 and {row["status"] for row in rows} == {"finished", "stopped"}
    for row in rows:
        lines = read_metrics(Path(row["run"]))
        assert len(lines) == int(row["epochs"]) and float(row["val_top1"]) == lines[-1]["val_top1"]
        # A rung stops a trial but never shortens its schedule.
        full = learning_rate(3, steps=16, warmup_steps=0, peak=float(row["optim.lr"]), warmup_lr=0)
        assert lines[0]["lr"] == pytest.approx(full)
        assert (row["status"] == "finished") == (len(lines) == 4)
        assert len(lines) in (1, 2, 4)  # rungs at 1 and 2
        # Checkpoints of stopped trials are removed, those of finished trials are kept.
        assert (row["status"] == "finished") == bool(list(Path(row["run"]).glob("checkpoints/*.pt")))
        bits = float(row["quant.bits"])
        assert bits < float(row["average_bits"]) < bits + 2  # the average includes the 8-bit first and last layers


@pytest.mark.slow
def test_reused_process_gives_the_same_results_as_separate_ones(search_file, tmp_path):
    """Trials run one at a time, so that both searches compare the same trials at rungs. The second trial learns almost
    nothing: a rung stops it on any CPU."""
    settings = ["concurrent=1", "studies.activation.values=[nulsq]", "studies.bits.values=[2]", "trials=2", "repeats=0",
                "points.quick.lr=0.1", "points.slow.lr=0.0001"]
    processes = {}
    for reuse in ("true", "false"):
        completed = search(search_file, f"dir={tmp_path}/{reuse}", f"reuse={reuse}", *settings)
        assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
        processes[reuse] = {event["key"]: event["process"] for event in journal.events(tmp_path / reuse)
                            if event["event"] == "result"}
    reused, separate = tmp_path / "true", tmp_path / "false"
    assert len(set(processes["false"].values())) == len(processes["false"]) == 2
    assert len(set(processes["true"].values())) == 1
    assert (reused / "rungs").read_text() == (separate / "rungs").read_text()
    assert json.loads((reused / "rungs").read_text())["stopped"]
    for key in processes["true"]:
        assert numbers(reused / "trials" / key) == numbers(separate / "trials" / key)


def test_each_finalist_is_trained_again_with_another_seed(finished_search):
    out, printed = finished_search
    rows = list(csv.DictReader((out / "trials.csv").open()))
    repeats = {row["study"]: row for row in rows if row["repeat"] == "1"}
    assert set(repeats) == {"nulsq_2", "nulsq_4", "lsq_2", "lsq_4"}
    for study, row in repeats.items():
        first = max((other for other in rows if other["study"] == study and other["repeat"] == "0"),
                    key=lambda other: (int(other["epochs"]), float(other["val_top1"])))
        assert row["number"] == first["number"] and row["optim.lr"] == first["optim.lr"]
        assert row["source"] == "repeat" and row["status"] == "finished"
        seeds = [read_recipe(Path(trial["run"])).run.seed for trial in (first, row)]
        assert seeds[1] == seeds[0] + 1
    assert "(2 seeds" in printed


def test_journal_has_every_trial_and_every_result_once(finished_search):
    out, _ = finished_search
    trials = journal.read(out)
    assert len({trial.key for trial in trials}) == len(trials) == 16
    # studies take turns: all have their first trial, then all have their second
    assert [trial.number for trial in trials[:12]] == [0] * 4 + [1] * 4 + [2] * 4
    assert_each_result_once(out)


def test_status_command_shows_the_trials_of_each_study(finished_search):
    out, _ = finished_search
    completed = subprocess.run([sys.executable, "-m", "tune.status", str(out)], cwd=ROOT, capture_output=True,
                               text=True)
    assert completed.returncode == 0 and f"{out}: finished" in completed.stdout
    lines = {line.split()[0]: line.split() for line in completed.stdout.splitlines()[2:-1]}
    rows = list(csv.DictReader((out / "trials.csv").open()))
    for study, fields in lines.items():
        members = [row for row in rows if row["study"] == study]
        counts = [sum(row["status"] == state for row in members) for state in ("finished", "stopped")]
        assert fields[1:5] == [*map(str, counts), "0", "0"]
        assert fields[-1] == f"{sum(int(row['epochs']) for row in members)}/16"
    assert len(lines) == 4


def test_rungs_hold_the_scores_of_each_trial(finished_search):
    out, _ = finished_search
    rungs = json.loads((out / "rungs").read_text())
    rows = {f"{row['study']}/{int(row['number']):03d}": row for row in csv.DictReader((out / "trials.csv").open())
            if row["repeat"] == "0"}
    assert {key for key, row in rows.items() if row["status"] == "stopped"} == set(rungs["stopped"])
    for key, row in rows.items():
        lines = read_metrics(Path(row["run"]))
        for milestone, values in rungs["rungs"][row["study"]]:
            if milestone < 4 and len(lines) >= milestone:
                assert values[key] == lines[milestone - 1]["val_top1"]


def test_each_study_has_a_winner_evaluated_on_test_and_its_recipe(finished_search):
    out, printed = finished_search
    for study in ("nulsq_2", "nulsq_4", "lsq_2", "lsq_4"):
        assert f"study {study}: winner's test top-1" in printed
        assert (out / "studies" / study / "best.yaml").is_file()
    assert len(list(out.glob("trials/*/*/test.json"))) == 8  # the winners with both seeds, no other trial
    assert (out / "report" / "index.html").is_file()
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in (out / "report").glob("*.png"))


def test_best_yaml_retrains_the_winner_to_the_same_numbers(finished_search, tmp_path):
    from nulsq.config import load_recipe
    out, _ = finished_search
    row = max((row for row in csv.DictReader((out / "trials.csv").open())
               if row["study"] == "nulsq_2" and row["repeat"] == "0"),
              key=lambda row: (int(row["epochs"]), float(row["val_top1"])))
    recipe = load_recipe(out / "studies" / "nulsq_2" / "best.yaml", {"run.root": str(tmp_path)})
    assert train(recipe, quiet=True).status == "finished"
    before, after = ([{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path)]
                     for path in (Path(row["run"]), path_of(recipe)))
    assert before == after


def test_second_call_shows_the_results_and_trains_nothing(search_file, finished_search):
    out, _ = finished_search
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/*.json*")}
    completed = search(search_file)
    assert completed.returncode == 0 and "study nulsq_2: winner's test top-1" in completed.stdout
    assert "Ray is up" not in completed.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/*.json*")}


def test_different_search_in_the_same_directory_is_an_error(search_file, finished_search):
    completed = search(search_file, "space.lr.high=0.5")
    assert completed.returncode == 2 and "holds another search (space.lr.high 0.1 -> 0.5)" in completed.stderr
    completed = search(search_file, "trials=5")
    assert completed.returncode == 2 and "say --extend 2, with trials=3" in completed.stderr
