"""Runs launched on this machine. Invalid input to any command: one error line, exit code 2, nothing written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.__main__ import main as launch
from nulsq.config import to_yaml
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import read_outcome
from nulsq.train import main as train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe_file(short, float_run, tmp_path):
    """A valid recipe in a temporary folder."""
    recipe = short("launched", model__init_from=str(float_run), optim__epochs=1, run__root=str(tmp_path / "runs"))
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    return path


def commands(recipe, *arguments):
    return (lambda: train([str(recipe), *arguments])), (lambda: launch(["local", "train", str(recipe), "--nproc", "2",
                                                                        *arguments]))


@pytest.mark.parametrize(("arguments", "message"), [
    (["optim.lrr=0.1"], "Did you mean: 'lr'"),
    (["--num_bits", "0"], "quant.bits = 0, allowed: at least 1"),
    (["--w_quantizer", "LSQ_quantizr"], "Did you mean 'LSQ_quantizer'"),
    (["--num_bitz", "2"], "Did you mean '--num_bits'"),
])
def test_invalid_setting_is_one_error_line_from_every_command(recipe_file, capsys, arguments, message):
    for command in commands(recipe_file, *arguments):
        assert command() == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (recipe_file.parent / "runs").exists()


@pytest.mark.parametrize("case", ["no_quantizer", "missing_beton", "truncated_beton", "architecture"])
def test_unusable_quantizer_or_file_is_one_error_line_from_every_command(recipe_file, digits, tmp_path, capfd, case):
    import shutil
    arguments, message = ["quant.activation.quantizer=nulsqq"], "Did you mean 'nulsq'"
    if case.endswith("beton"):
        if not (digits / "train.beton").is_file():
            pytest.skip("ffcv is not installed")
        shutil.copytree(digits, tmp_path / "digits")
        file = tmp_path / "digits" / "train.beton"
        file.unlink() if case == "missing_beton" else os.truncate(file, 5000)
        arguments = [f"data.path={tmp_path}/digits"]
        message = "train.beton is missing" if case == "missing_beton" else "truncated or replaced"
    if case == "architecture":
        torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "other.pth")
        arguments, message = ["--init_from", str(tmp_path / "other.pth")], "of another architecture"
    for command in commands(recipe_file, *arguments):
        assert command() == 2
        error = capfd.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_print_shows_the_command_and_runs_nothing(recipe_file, capsys):
    assert launch(["local", "train", str(recipe_file), "--nproc", "2", "--print", "optim.lr=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "torch.distributed.run" in printed
    assert printed.rstrip().endswith(f"-m nulsq.train {recipe_file} optim.lr=0.1")
    assert "127.0.0.1" in printed
    assert launch(["local", "train", str(recipe_file), "--print"]) == 0
    assert "torch.distributed" not in capsys.readouterr().out
    assert not (recipe_file.parent / "runs").exists()


@pytest.mark.parametrize("nproc", [pytest.param("1", marks=pytest.mark.long), "2"])
def test_launched_run_trains_and_records_its_environment_without_secrets(recipe_file, capfd, monkeypatch, nproc):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("NULSQ_TOKEN", "hush")
    code = launch(["local", "train", str(recipe_file), "--nproc", nproc, "run.train_id=" + nproc])
    assert code == 0, capfd.readouterr().err[-2000:]
    run = recipe_file.parent / "runs" / f"launched-{nproc}"
    assert read_outcome(run)["outcome"] == "finished" and len(read_metrics(run)) == 1
    assert "val_top1" in read_metrics(run)[0]
    recipe, code = (run / "recipe.yaml").read_text(), (run / "code.txt").read_text()
    assert "SLURM_JOB_ID='17'" in code and "hush" not in code  # the job id is recorded, no secret is
    assert "lr: 0.05" in recipe and f"torch {torch.__version__.split('+')[0]}" in code and "nulsq" in code


def test_exit_code_states_how_the_ranks_ended(recipe_file, capfd):
    """torchrun exits with 1 whatever happened; the code comes from the outcome file."""
    command = ["local", "train", str(recipe_file), "--nproc", "2", "optim.lr=1e30", "guard.rollbacks=0"]
    assert launch(command) == 3


PLAIN, TWO_RANKS = ["nulsq.train"], ["launch", "local", "train", "--nproc", "2"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_first_signal_requests_a_stop_and_a_later_one_ends_the_process(name):
    """Slurm and torchrun may both send the signal: two signals in quick succession are one request."""
    code = f"""
import os, signal, time
from nulsq.training.stop import DEBOUNCE, DEBOUNCE_CTRL_C, stop_on_signal
with stop_on_signal() as stop:
    print(stop(), flush=True)
    os.kill(os.getpid(), signal.{name})
    os.kill(os.getpid(), signal.{name})
    print(stop(), flush=True)
    time.sleep(1.1 * (DEBOUNCE_CTRL_C if "{name}" == "SIGINT" else DEBOUNCE))
    os.kill(os.getpid(), signal.{name})
    print("still here", flush=True)
"""
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert completed.stdout.split() == ["False", "True"], completed.stderr
    assert completed.returncode == -getattr(signal, name)


@pytest.mark.parametrize(("number", "module"), [
    ("SIGTERM", TWO_RANKS), pytest.param("SIGINT", ["launch", "local", "train"], marks=pytest.mark.long),
    pytest.param("SIGUSR1", PLAIN, marks=pytest.mark.long), pytest.param("SIGUSR1", TWO_RANKS, marks=pytest.mark.long)])
def test_signal_saves_the_run_and_the_same_command_resumes_it(recipe_file, number, module):
    label = f"{number}-{len(module)}"
    command = [sys.executable, "-m", *module, str(recipe_file), "optim.epochs=6", f"run.train_id={label}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = recipe_file.parent / "runs" / f"launched-{label}"
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, number))
    printed, _ = process.communicate(timeout=90)
    assert process.returncode == 99, printed
    saved = read_outcome(run)
    assert saved["outcome"] == "saved" and saved["requeue"] and 0 < saved["step"] <= 24
    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert f"continuing at step {saved['step']} of 24" in resumed.stdout
    lines = read_metrics(run)
    assert [line["epoch"] for line in lines] == list(range(1, 7))
    assert all(line["train_images"] == 128 for line in lines)  # an interrupted epoch counts every image once


def test_search_rejects_an_invalid_setting_before_ray_starts(tmp_path, capfd):
    demo = ROOT / "configs/search/demo.yaml"
    assert launch(["local", "search", str(demo), "space.lr.key=optim.lrr", f"dir={tmp_path}/out"]) == 2
    error = capfd.readouterr().err
    assert "Did you mean: 'lr'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_path_with_shell_characters_is_passed_on_unchanged(short, float_run, tmp_path, capfd):
    folder = tmp_path / "a b'$(touch x)"
    folder.mkdir()
    recipe = short("odd", model__init_from=str(float_run), optim__epochs=1, run__root=str(folder / "runs"))
    (folder / "r.yaml").write_text(to_yaml(recipe))
    assert launch(["local", "train", str(folder / "r.yaml")]) == 0, capfd.readouterr().err[-2000:]
    assert read_outcome(path_of(recipe))["outcome"] == "finished"
