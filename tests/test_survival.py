"""Resuming runs: damaged checkpoints, full disks, stops in evaluation, saves on demand, other numbers of ranks."""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import nulsq.train
import nulsq.training.stop
from nulsq.config import to_yaml
from nulsq.errors import InputError
from nulsq.run import checkpoint
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import read_outcome
from nulsq.train import train
from tests.runs import assert_same_state, last, numbers, torchrun

CONTENT = {"model": {"w": torch.arange(1000.0)}, "best": None, "step": 0, "epoch": 0}


def content(step, epoch=0, best=None):
    return CONTENT | {"step": step, "epoch": epoch, "best": best and dict(zip(("step", "epoch"), best, strict=True))}


# ---- checkpoints


def test_newest_two_checkpoints_and_the_best_are_kept(tmp_path):
    for epoch in range(1, 6):
        checkpoint.save(tmp_path, content(10 * epoch, epoch, best=(20, 2) if epoch > 1 else (10, 1)))
    names = [path.name for path in checkpoint.files(tmp_path)]
    assert names == [checkpoint.file_name(10 * epoch, epoch) for epoch in (5, 4, 2)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted([*names, "manifest.json"])
    assert checkpoint.choose(tmp_path).name == names[2] and checkpoint.choose(tmp_path, "last").name == names[0]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "replaced", "missing"])
def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, content(step))
    file = checkpoint.newest(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
        assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 1
        return
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    file.write_bytes({"truncated": bytes(data[:-200]), "one bit": bytes(data), "empty": b"",
                      "replaced": checkpoint.files(tmp_path)[1].read_bytes()}[damage])
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged.*Continuing from step-00000001"):
        assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 1
    checkpoint.files(tmp_path)[1].write_bytes(b"")
    with pytest.raises(InputError, match="none of the 2 checkpoints"):
        checkpoint.newest(tmp_path)


def test_checkpoints_load_without_a_manifest(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, content(step))
    for text in ("{", "[]", None):
        manifest = tmp_path / "checkpoints" / "manifest.json"
        manifest.unlink() if text is None else manifest.write_text(text)
        assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 2


def test_damaged_checkpoint_bytes_never_crash(tmp_path):
    """Changed or truncated bytes raise InputError; without a manifest a dict may load, but nothing crashes."""
    checkpoint.save(tmp_path, content(1))
    path, draw = checkpoint.newest(tmp_path), random.Random(0)
    original = path.read_bytes()
    for with_manifest in (True, False):
        if not with_manifest:
            (tmp_path / "checkpoints" / "manifest.json").unlink()
        for _ in range(150):
            damaged = bytearray(original)
            for _ in range(draw.choice((1, 8, 64))):
                damaged[draw.randrange(len(original))] = draw.randrange(256)
            path.write_bytes(damaged[:draw.choice((None, draw.randrange(len(original))))])
            if path.read_bytes() == original:
                continue
            try:
                loaded = checkpoint.load(path)
            except InputError:
                continue
            assert not with_manifest
            assert isinstance(loaded, dict)


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    (tmp_path / "checkpoints").mkdir()
    torch.save(content(1) | {"format": checkpoint.FORMAT, "extra": Touch()},
               tmp_path / "checkpoints" / checkpoint.file_name(1, 0))
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.newest(tmp_path)
    assert not (tmp_path / "was run").exists()


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from nulsq.train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_full_disk_ends_the_run_and_keeps_its_last_checkpoint(short, float_run, uninterrupted, tmp_path):
    """A limit on the file size makes the kernel fail in the middle of a write, as a full disk does."""
    recipe = short("full", model__init_from=str(float_run), optim__epochs=3)
    shutil.copytree(uninterrupted, path_of(recipe))  # the state before the disk is full: at the second epoch
    checkpoint.files(path_of(recipe))[0].unlink()
    (path_of(recipe) / "recipe.yaml").write_text(to_yaml(recipe))
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    before = checkpoint.newest(path_of(recipe))
    command = [sys.executable, "-c", LIMITED, str(before.stat().st_size // 2), str(tmp_path / "r.yaml")]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert completed.returncode == 2, completed.stderr[-2000:]
    assert f"File too large. The last good one is {before.name}" in completed.stderr
    assert completed.stderr.count("error:") == 1
    assert read_outcome(path_of(recipe))["outcome"] == "failed"
    assert checkpoint.newest(path_of(recipe)) == before  # verified
    assert not list((path_of(recipe) / "checkpoints").glob("*.unfinished"))
    assert train(recipe, quiet=True).status == "finished"
    assert_same_state(last(path_of(recipe)), last(uninterrupted))


def test_error_for_a_read_only_folder_names_it(tmp_path):
    checkpoint.save(tmp_path, content(1))
    folder = tmp_path / "checkpoints"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(InputError, match="checkpoints: Read-only file system. There is none yet"):
            checkpoint.save(tmp_path, content(2))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 1


# ---- stopping and resuming


def test_stop_in_evaluation_saves_the_state_before_it(short, float_run, uninterrupted, steps_done):
    recipe, polls = short("stopped-in-evaluation", model__init_from=str(float_run), optim__epochs=3), []

    def stop():
        if steps_done[-1] == 8:
            polls.append(1)
        return len(polls) == 2  # the first poll follows the step, the second is in the evaluation

    state = train(recipe, stop=stop, quiet=True)
    assert (state.status, state.step, state.epoch) == ("saved", 8, 1)
    assert checkpoint.newest(path_of(recipe)).name == checkpoint.file_name(8, 1)
    assert len(read_metrics(path_of(recipe))) == 1
    assert train(recipe, quiet=True).status == "finished"
    assert numbers(path_of(recipe)) == numbers(uninterrupted)
    assert_same_state(last(path_of(recipe)), last(uninterrupted))


def test_command_saves_the_run_after_a_signal(short, float_run, tmp_path, monkeypatch):
    recipe = short("signalled", model__init_from=str(float_run), optim__epochs=1)
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    original_poll = nulsq.training.stop.StopRequest.poll

    def poll_with_signal(request, step):
        if step == 2:
            signal.raise_signal(signal.SIGUSR1)
        return original_poll(request, step)

    monkeypatch.setattr(nulsq.training.stop.StopRequest, "poll", poll_with_signal)
    assert nulsq.train.main([str(tmp_path / "r.yaml")]) == 99
    outcome = read_outcome(path_of(recipe))
    assert (outcome["outcome"], outcome["requeue"], outcome["step"]) == ("saved", True, 2)
    monkeypatch.undo()
    assert nulsq.train.main([str(tmp_path / "r.yaml")]) == 0
    assert read_outcome(path_of(recipe))["outcome"] == "finished"


def test_saves_within_an_epoch_and_on_demand_do_not_change_results(short, float_run, uninterrupted, steps_done, capsys):
    recipe = short("saving", model__init_from=str(float_run), optim__epochs=3, run__save_every=3)
    seen, save_request = set(), path_of(recipe) / "save"

    def request_save():
        seen.update(path.name for path in checkpoint.files(path_of(recipe)))
        if steps_done[-1] == 7:
            save_request.touch()
        return False

    assert train(recipe, stop=request_save).status == "finished"
    assert {checkpoint.file_name(3, 0), checkpoint.file_name(6, 1), checkpoint.file_name(8, 1)} <= seen
    assert "saved at step 8, as the file save asks for" in capsys.readouterr().out and not save_request.exists()
    assert numbers(path_of(recipe)) == numbers(uninterrupted)
    assert_same_state(last(path_of(recipe)), last(uninterrupted))


def test_two_ranks_resume_exactly_and_one_rank_resumes_from_two(short, float_run, tmp_path, capsys):
    """Batch norm is per rank here: the state of each rank is saved and restored by the same rank."""
    settings = {"model__init_from": str(float_run), "optim__epochs": 2, "optim__ema_decay": 0.9, "run__save_every": 3}
    uninterrupted, killed, on_one_rank = (
        short(name, **settings) for name in ("two-uninterrupted", "two-killed", "two-then-one"))
    assert torchrun(uninterrupted, tmp_path, 2).returncode == 0
    shutil.copytree(path_of(uninterrupted), path_of(killed))
    for recipe in (killed, on_one_rank):
        shutil.copytree(path_of(uninterrupted), path_of(recipe), dirs_exist_ok=True)
        (path_of(recipe) / "recipe.yaml").write_text(to_yaml(recipe))
        newest, before, *_ = checkpoint.files(path_of(recipe))
        assert (newest.name, before.name) == (checkpoint.file_name(8, 2), checkpoint.file_name(6, 1))
        newest.unlink()
    ranks = checkpoint.load(before)["ranks"]
    assert len(ranks) == 2 and any((ranks[0]["batch_norm"][key] != ranks[1]["batch_norm"][key]).any()
                                   for key in ranks[0]["batch_norm"])
    completed = torchrun(killed, tmp_path, 2)
    assert completed.returncode == 0 and "continuing at step 6 of 8" in completed.stdout, completed.stderr[-2000:]
    assert numbers(path_of(killed)) == numbers(path_of(uninterrupted))
    assert_same_state(last(path_of(killed)), last(path_of(uninterrupted)))
    assert train(on_one_rank).status == "finished"
    assert "saved by 2 ranks, continued by 1" in capsys.readouterr().out
    last_of_one, last_of_two = numbers(path_of(on_one_rank))[-1], numbers(path_of(uninterrupted))[-1]
    assert (last_of_one["train_images"], last_of_one["step"]) == (last_of_two["train_images"], last_of_two["step"])
    assert last_of_one["train_loss"] == pytest.approx(last_of_two["train_loss"], rel=0.1)


@pytest.mark.slow
def test_run_killed_at_any_moment_equals_an_uninterrupted_run(tmp_path):
    from bench.kill_test import main
    assert main(["--kills", "3", "--dir", str(tmp_path), "--json", str(tmp_path / "kills.json")]) == 0
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["identical"] and result["kills"] == 3


@pytest.mark.slow
def test_memory_threads_and_files_stay_constant_over_many_epochs(tmp_path):
    from bench.soak import main
    assert main(["--epochs", "40", "--json", str(tmp_path / "soak.json")]) == 0
    assert json.loads((tmp_path / "soak.json").read_text())["flat"]
