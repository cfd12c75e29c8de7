"""Runs that survive: damaged checkpoints, full disks, stops in evaluation, saves on demand, other numbers of ranks."""

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


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    for epoch in range(1, 6):
        checkpoint.save(tmp_path, content(10 * epoch, epoch, best=(20, 2) if epoch > 1 else (10, 1)))
    names = [path.name for path in checkpoint.files(tmp_path)]
    assert names == [checkpoint.file_name(10 * epoch, epoch) for epoch in (5, 4, 2)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted([*names, "manifest.json"])
    assert checkpoint.choose(tmp_path).name == names[2] and checkpoint.choose(tmp_path, "last").name == names[0]


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "replaced", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, content(step))
    victim = checkpoint.newest(tmp_path)
    whole = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
        assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 1
        return
    if damage == "one bit":
        whole[len(whole) // 2] ^= 1
    victim.write_bytes({"truncated": bytes(whole[:-200]), "one bit": bytes(whole), "empty": b"",
                        "replaced": checkpoint.files(tmp_path)[1].read_bytes()}[damage])
    with pytest.warns(UserWarning, match=rf"{victim.name} is damaged.*Continuing from step-00000001"):
        assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 1
    checkpoint.files(tmp_path)[1].write_bytes(b"")
    with pytest.raises(InputError, match="none of the 2 checkpoints"):
        checkpoint.newest(tmp_path)


def test_a_lost_manifest_leaves_files_to_speak_for_themselves(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, content(step))
    for text in ("{", "[]", None):
        manifest = tmp_path / "checkpoints" / "manifest.json"
        manifest.unlink() if text is None else manifest.write_text(text)
        assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 2


def test_damaged_bytes_never_load_crash_or_run(tmp_path):
    """Any byte changed, anything cut off: an InputError; and without a manifest never another tensor than was saved."""
    checkpoint.save(tmp_path, content(1))
    path, draw = checkpoint.newest(tmp_path), random.Random(0)
    whole = path.read_bytes()
    for with_manifest in (True, False):
        if not with_manifest:
            (tmp_path / "checkpoints" / "manifest.json").unlink()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(draw.choice((1, 8, 64))):
                damaged[draw.randrange(len(whole))] = draw.randrange(256)
            path.write_bytes(damaged[:draw.choice((None, draw.randrange(len(whole))))])
            if path.read_bytes() == whole:
                continue
            try:
                found = checkpoint.load(path)
            except InputError:
                continue
            assert not with_manifest
            assert isinstance(found, dict)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
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


def test_a_disk_without_room_ends_the_run_with_its_last_checkpoint_intact(short, float_run, straight, tmp_path):
    """A bound on the size of files gives the kernel's own error in the middle of a write, as a full disk does."""
    recipe = short("full", model__init_from=str(float_run), optim__epochs=3)
    shutil.copytree(straight, path_of(recipe))  # the run as it was when it could still write: at its second epoch
    checkpoint.files(path_of(recipe))[0].unlink()
    (path_of(recipe) / "recipe.yaml").write_text(to_yaml(recipe))
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    before = checkpoint.newest(path_of(recipe))
    command = [sys.executable, "-c", LIMITED, str(before.stat().st_size // 2), str(tmp_path / "r.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"File too large. The last good one is {before.name}" in done.stderr and done.stderr.count("error:") == 1
    assert read_outcome(path_of(recipe))["outcome"] == "failed"
    assert checkpoint.newest(path_of(recipe)) == before  # verified
    assert not list((path_of(recipe) / "checkpoints").glob("*.unfinished"))
    assert train(recipe, quiet=True).status == "finished"
    assert_same_state(last(path_of(recipe)), last(straight))


def test_a_folder_that_cannot_be_written_names_itself(tmp_path):
    checkpoint.save(tmp_path, content(1))
    folder = tmp_path / "checkpoints"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing may be mounted here")
    try:
        with pytest.raises(InputError, match="checkpoints: Read-only file system. There is none yet"):
            checkpoint.save(tmp_path, content(2))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert checkpoint.load(checkpoint.newest(tmp_path))["step"] == 1


# ---- stopping and going on


def test_a_stop_in_evaluation_saves_what_was_before_it(short, float_run, straight, steps_done):
    recipe, polls = short("stopped-in-evaluation", model__init_from=str(float_run), optim__epochs=3), []

    def stop():
        if steps_done[-1] == 8:
            polls.append(1)
        return len(polls) == 2  # the first poll is that after the step

    state = train(recipe, stop=stop, quiet=True)
    assert (state.status, state.step, state.epoch) == ("saved", 8, 1)
    assert checkpoint.newest(path_of(recipe)).name == checkpoint.file_name(8, 1)
    assert len(read_metrics(path_of(recipe))) == 1
    assert train(recipe, quiet=True).status == "finished"
    assert numbers(path_of(recipe)) == numbers(straight)
    assert_same_state(last(path_of(recipe)), last(straight))


def test_the_command_answers_a_signal_with_a_saved_run(short, float_run, tmp_path, monkeypatch):
    recipe = short("signalled", model__init_from=str(float_run), optim__epochs=1)
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    plain = nulsq.training.stop.StopRequest.poll

    def signalled(request, step):
        if step == 2:
            signal.raise_signal(signal.SIGUSR1)
        return plain(request, step)

    monkeypatch.setattr(nulsq.training.stop.StopRequest, "poll", signalled)
    assert nulsq.train.main([str(tmp_path / "r.yaml")]) == 99
    outcome = read_outcome(path_of(recipe))
    assert (outcome["outcome"], outcome["requeue"], outcome["step"]) == ("saved", True, 2)
    monkeypatch.undo()
    assert nulsq.train.main([str(tmp_path / "r.yaml")]) == 0
    assert read_outcome(path_of(recipe))["outcome"] == "finished"


def test_saves_within_an_epoch_and_on_demand_change_nothing(short, float_run, straight, steps_done, capsys):
    recipe = short("saving", model__init_from=str(float_run), optim__epochs=3, run__save_every=3)
    seen, wish = set(), path_of(recipe) / "save"

    def look():
        seen.update(path.name for path in checkpoint.files(path_of(recipe)))
        if steps_done[-1] == 7:
            wish.touch()
        return False

    assert train(recipe, stop=look).status == "finished"
    assert {checkpoint.file_name(3, 0), checkpoint.file_name(6, 1), checkpoint.file_name(8, 1)} <= seen
    assert "saved at step 8, as the file save asks for" in capsys.readouterr().out and not wish.exists()
    assert numbers(path_of(recipe)) == numbers(straight)
    assert_same_state(last(path_of(recipe)), last(straight))


def test_two_ranks_stop_and_go_on_exactly_and_one_goes_on_from_two(short, float_run, tmp_path, capsys):
    """Batch norm is per rank here: what each rank alone knows is saved and taken up by the same rank."""
    settings = {"model__init_from": str(float_run), "optim__epochs": 2, "optim__ema_decay": 0.9, "run__save_every": 3}
    straight, killed, alone = (short(name, **settings) for name in ("two-straight", "two-killed", "two-then-one"))
    assert torchrun(straight, tmp_path, 2).returncode == 0
    shutil.copytree(path_of(straight), path_of(killed))
    for recipe in (killed, alone):
        shutil.copytree(path_of(straight), path_of(recipe), dirs_exist_ok=True)
        (path_of(recipe) / "recipe.yaml").write_text(to_yaml(recipe))
        newest, before, *_ = checkpoint.files(path_of(recipe))
        assert (newest.name, before.name) == (checkpoint.file_name(8, 2), checkpoint.file_name(6, 1))
        newest.unlink()
    ranks = checkpoint.load(before)["ranks"]
    assert len(ranks) == 2 and any((ranks[0]["batch_norm"][key] != ranks[1]["batch_norm"][key]).any()
                                   for key in ranks[0]["batch_norm"])
    done = torchrun(killed, tmp_path, 2)
    assert done.returncode == 0 and "continuing at step 6 of 8" in done.stdout, done.stderr[-2000:]
    assert numbers(path_of(killed)) == numbers(path_of(straight))
    assert_same_state(last(path_of(killed)), last(path_of(straight)))
    assert train(alone).status == "finished"
    assert "saved by 2 ranks, continued by 1" in capsys.readouterr().out
    one, two = numbers(path_of(alone))[-1], numbers(path_of(straight))[-1]
    assert (one["train_images"], one["step"]) == (two["train_images"], two["step"])
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=0.1)


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_with_the_same_numbers(tmp_path):
    from bench.kill_test import main
    assert main(["--kills", "3", "--dir", str(tmp_path), "--json", str(tmp_path / "kills.json")]) == 0
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["identical"] and found["kills"] == 3


@pytest.mark.slow
def test_many_epochs_leave_memory_threads_and_files_as_they_were(tmp_path):
    from bench.soak import main
    assert main(["--epochs", "40", "--json", str(tmp_path / "soak.json")]) == 0
    assert json.loads((tmp_path / "soak.json").read_text())["flat"]
