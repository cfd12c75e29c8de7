"""Data sets staged on a node's own disk: copied once, completely or not at all, and read from there by DataSet."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from launch.stage import main, stage
from nulsq.data.manifest import SCRATCH, DataSet, copy_of, describe_file
from nulsq.errors import InputError
from nulsq.run.directory import path_of
from nulsq.train import train
from tests.runs import assert_same_state, last, numbers

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(digits, tmp_path) -> Path:
    return shutil.copytree(digits, tmp_path / "source")


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def copies_in(scratch: Path) -> list[str]:
    """Names of the folders of all copies, complete or not."""
    return sorted(path.name for path in scratch.glob("nulsq-data-*/*") if path.is_dir())


def start(source: Path, scratch: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "launch.stage", str(source), str(scratch)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_data_set_is_copied_once_and_read_from_the_copy(source, scratch, capsys):
    assert DataSet(source).path == source
    assert main([str(source), str(scratch)]) == 0
    assert "copied" in capsys.readouterr().out
    digest = hashlib.sha256((source / "manifest.json").read_bytes()).hexdigest()
    copy = scratch / f"nulsq-data-{os.getuid()}" / digest[:16]
    data = DataSet(source)
    assert data.path == copy and data.labels("train").size == data.counts["train"]
    assert data.name == "digits" and data.images("test").nbytes > 0
    for name, expected in data.files.items():
        assert describe_file(copy / name) == expected
    assert main([str(source), str(scratch)]) == 0
    printed = capsys.readouterr().out
    assert f"is at {copy} already" in printed and printed.count("\n") == 1
    for name in data.files:  # the manifest alone identifies the data set
        (source / name).unlink()
    assert DataSet(source).path == copy


def test_run_on_staged_data_equals_run_on_the_source(short, digits, tmp_path, monkeypatch):
    recipes = [short(f"staged_{name}", optim__epochs=1, model__pretrained=False) for name in ("before", "after")]
    train(recipes[0], quiet=True)
    stage(digits, tmp_path)
    monkeypatch.setenv(SCRATCH, str(tmp_path))
    train(recipes[1], quiet=True)
    runs = [path_of(recipe) for recipe in recipes]
    assert numbers(runs[0]) == numbers(runs[1])
    assert_same_state(last(runs[0])["model"], last(runs[1])["model"])
    assert f"path: {digits}" in (runs[1] / "recipe.yaml").read_text()


def test_concurrent_processes_of_a_node_copy_once(source, scratch):
    """Both wait for a lock that the test holds; once it is released, one copies and the other uses that copy."""
    folder = copy_of(scratch, (source / "manifest.json").read_bytes())
    folder.parent.mkdir(parents=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [start(source, scratch) for _ in range(2)]
        first_lines = [process.stdout.readline() for process in processes]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all("waiting for it" in line for line in first_lines)
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(line.startswith("copied") for line in outputs) == [False, True]
    assert sum("already" in line for line in outputs) == 1 and copies_in(scratch) == [folder.name]


def test_unfinished_copy_of_a_killed_process_is_replaced(source, scratch):
    """Killed while it reads from a pipe; the next call removes the unfinished copy and makes a complete one."""
    content = (source / "train_images.npy").read_bytes()
    (source / "train_images.npy").unlink()
    os.mkfifo(source / "train_images.npy")  # a reader blocks until the test writes
    folder = copy_of(scratch, (source / "manifest.json").read_bytes())
    code = ("import sys; from pathlib import Path; Path.is_file = Path.exists; from launch.stage import main; "
            "main(sys.argv[1:])")  # stage refuses a pipe: is_file is false
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(scratch)], cwd=ROOT)
    with (source / "train_images.npy").open("wb") as pipe:
        pipe.write(content[:len(content) // 2])
        pipe.flush()
        partial = folder.with_name(f".{folder.name}.unfinished") / "train_images.npy"
        deadline = time.monotonic() + 60
        while not (partial.is_file() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert copies_in(scratch) == [f".{folder.name}.unfinished"] and not (partial.parent / "manifest.json").exists()
    (source / "train_images.npy").unlink()
    (source / "train_images.npy").write_bytes(content)
    assert DataSet(source).path == source
    assert stage(source, scratch) == (folder, True)
    assert copies_in(scratch) == [folder.name] and DataSet(source).path == folder


@pytest.mark.parametrize(("damage", "message"), [
    (lambda file: os.truncate(file, 1000), "test_images.npy has 1000 bytes, it was written with"),
    (lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
     "test_images.npy: its checksum differs from the one in the manifest"),
    (lambda file: file.unlink(), "test_images.npy is missing"),
], ids=["truncated", "changed", "missing"])
def test_damaged_source_file_is_named_and_nothing_is_copied(source, scratch, capsys, damage, message):
    damage(source / "test_images.npy")
    assert main([str(source), str(scratch)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(source) in error and error.count("\n") == 1
    assert copies_in(scratch) == []


def test_changed_manifest_gets_its_own_copy(source, scratch):
    first, _ = stage(source, scratch)
    content = json.loads((source / "manifest.json").read_text())
    (source / "manifest.json").write_text(json.dumps(content | {"source": "prepared again"}))
    assert DataSet(source).path == source
    second, copied = stage(source, scratch)
    assert copied and copies_in(scratch) == sorted([first.name, second.name]) and DataSet(source).path == second


def test_truncated_copy_is_ignored_and_replaced(source, scratch):
    folder, _ = stage(source, scratch)
    os.truncate(folder / "train_images.npy", 100)
    assert DataSet(source).path == source
    assert stage(source, scratch) == (folder, True) and DataSet(source).path == folder


def test_full_disk_error_states_the_missing_space(source, scratch, monkeypatch):
    """Free disk space is simulated: a test cannot choose it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    needed = sum(file.bytes for file in DataSet(source).files.values())
    with pytest.raises(InputError, match=f"has 0.00 GB free.*{(needed - 10**6) / 1e9:.2f} GB are missing"):
        stage(source, scratch)
    assert copies_in(scratch) == []


@pytest.mark.parametrize(("name", "message"), [("../../outside", "not in its own folder"), (None, "no manifest")])
def test_missing_manifest_or_path_outside_the_folder_is_an_error(source, scratch, tmp_path, capsys, name, message):
    if name is None:
        (source / "manifest.json").unlink()
    else:
        content = json.loads((source / "manifest.json").read_text())
        content["files"] = {name: {"bytes": 1, "sha256": ""}} | content["files"]
        (source / "manifest.json").write_text(json.dumps(content))
    assert main([str(source), str(scratch)]) == 2
    assert message in capsys.readouterr().err and copies_in(scratch) == [] and not (tmp_path / "outside").exists()


def test_scratch_that_is_not_a_folder_is_an_error(source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(source), str(tmp_path / "file")]) == 2
    assert "cannot be copied to" in capsys.readouterr().err
