"""Preparation is atomic and repeatable, and errors name the bad file or argument."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from data_prep import progress
from data_prep.__main__ import main
from nulsq.data.manifest import DataSet


@pytest.fixture
def class_folders(tmp_path):
    """Twelve small photographs in two classes."""
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for i in range(6):
            path = tmp_path / "source" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "source"


def test_digits_come_from_scikit_learn_with_a_stratified_test_split(digits):
    from sklearn.datasets import load_digits
    data = DataSet(digits)
    assert sum(data.counts.values()) == len(load_digits().target)
    assert data.images("train").shape[1:] == (32, 32, 3)
    share = np.bincount(data.labels("test")) / np.bincount(load_digits().target)
    assert abs(share - 0.2).max() < 0.01


def test_second_preparation_reuses_the_existing_data_set(digits, capsys):
    before = (digits / "manifest.json").stat().st_mtime_ns
    assert main(["digits", "--out", str(digits)]) == 0
    assert "was there already" in capsys.readouterr().out
    assert (digits / "manifest.json").stat().st_mtime_ns == before


def test_check_finds_a_changed_byte(digits, tmp_path, capsys):
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    assert main(["check", str(copy)]) == 0
    with (copy / "train_images.npy").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x07\x08\x09")
    assert main(["check", str(copy)]) == 2
    assert "train_images.npy: the checksum" in capsys.readouterr().err


def test_class_folders_become_a_data_set_with_a_stratified_test_split(class_folders, tmp_path):
    assert main(["folder", "--source", str(class_folders), "--out", str(tmp_path / "out")]) == 0
    data = DataSet(tmp_path / "out")
    assert data.classes == ["cat", "dog"] and data.counts == {"train": 10, "test": 2}
    assert sorted(path.parent.name for path in data.paths("test")) == ["cat", "dog"]
    assert not set(data.paths("test")) & set(data.paths("train"))


def test_train_folder_without_val_folder_is_not_a_class(class_folders, tmp_path):
    (tmp_path / "outer").mkdir()
    class_folders.rename(tmp_path / "outer" / "train")
    assert main(["folder", "--source", str(tmp_path / "outer"), "--out", str(tmp_path / "out")]) == 0
    data = DataSet(tmp_path / "out")
    assert data.classes == ["cat", "dog"] and data.paths("train")[0].is_file()


def test_output_folder_with_another_data_set_is_an_error(digits, capsys):
    assert main(["cifar10", "--out", str(digits)]) == 2
    assert "holds the data set digits, not cifar10" in capsys.readouterr().err


@pytest.mark.parametrize("with_ffcv", [True, False])
def test_damaged_images_are_found_with_and_without_ffcv(class_folders, tmp_path, capsys, monkeypatch, with_ffcv):
    import importlib.util
    if not with_ffcv:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *r: None if name == "ffcv" else real(name, *r))
    whole = (class_folders / "cat" / "1.png").read_bytes()
    (class_folders / "cat" / "1.png").write_bytes(whole[:len(whole) // 2])
    (class_folders / "dog" / "3.png").write_bytes(b"not an image")
    assert main(["folder", "--source", str(class_folders), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "dog/3.png" in error and "cat/1.png" in error and "2 of" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["imagenet", "--source", "{}/source", "--out", "{}/out"], "not ImageNet's usual layout"),
    (["folder", "--source", "{}/nowhere", "--out", "{}/out"], "not a folder"),
    (["folder", "--source", "{}/source/cat", "--out", "{}/out"], "no class folders"),
    (["cifar10", "--source", "{}/source", "--out", "{}/out"], "does not hold cifar-10-batches-py"),
    (["digits", "--out", "{}/source"], "not a prepared data set"),
    (["check", "{}/source"], "not a prepared data set"),
    (["digitz", "--out", "x"], "invalid choice: 'digitz'"),
])
def test_invalid_input_prints_one_line_and_returns_exit_code_2(class_folders, tmp_path, capsys, arguments, message):
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_preparation_without_ffcv_writes_everything_but_beton_files(tmp_path, monkeypatch, capsys):
    import importlib.util
    pytest.importorskip("sklearn")
    from nulsq.config import Data
    from nulsq.data import build_loaders
    from nulsq.errors import InputError
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ffcv" else real(name, *rest))
    assert main(["digits", "--out", str(tmp_path / "digits")]) == 0
    assert "ffcv is not installed" in capsys.readouterr().out
    data = DataSet(tmp_path / "digits")
    assert not list(data.path.glob("*.beton"))
    assert build_loaders(Data(path=str(data.path)), data, 0).loader_name == "device"
    with pytest.raises(InputError, match="needs ffcv"):
        build_loaders(Data(path=str(data.path), loader="ffcv"), data, 0)
    monkeypatch.setattr(importlib.util, "find_spec", real)
    if real("ffcv"):  # installed later: the data set still has no .beton files
        with pytest.raises(InputError, match="no train.beton"):
            build_loaders(Data(path=str(data.path), loader="ffcv"), data, 0)


# ---- progress


@pytest.mark.parametrize("name", ["folder", "digits"])
def test_output_to_a_file_has_no_progress_bar(class_folders, tmp_path, name):
    """A progress bar would write 100,000 lines to a log for a million images."""
    out, log = tmp_path / "out", tmp_path / "log"
    source = ["--source", str(class_folders), "--write-mode", "jpg", "--workers", "2"] if name == "folder" else []
    for command in ([name, "--out", str(out), *source], ["check", str(out), "--workers", "2"]):
        with log.open("w") as file:
            subprocess.run([sys.executable, "-m", "data_prep", *command], cwd=ROOT, stdout=file,
                           stderr=subprocess.STDOUT, check=True, timeout=300)
        text = log.read_bytes().decode()
        assert "\r" not in text and "\x1b" not in text
        assert 0 < text.count("\n") <= 10, text
        if name == "folder":
            assert ("reading: 12 of 12" if command[0] == name else "decoding train.beton: 10 of 10") in text
        if command[0] == name and (out / "train.beton").is_file():
            assert "writing train.beton: 0 of" in text and "writing test.beton: 0 of" in text


@pytest.mark.parametrize(("hours", "lines"), [(0.001, 2), (0.1, 13), (1, 22), (100, 22)])
def test_progress_of_a_long_step_is_at_most_two_dozen_lines(capsys, hours, lines):
    total, now = 1_281_167, [0.0]
    progress_lines = progress.ProgressLines("writing train.beton", total, clock=lambda: now[0])
    for _ in range(total // 50):
        now[0] += hours * 3600 / total * 50
        progress_lines.update(50)
    progress_lines.update(total % 50)
    progress_lines.close()
    written = capsys.readouterr().err.splitlines()
    assert abs(len(written) - lines) <= 1
    assert written[0] == "writing train.beton: 0 of 1,281,167"
    assert written[-1].startswith("writing train.beton: 1,281,167 of 1,281,167, ")
    if hours == 1:
        assert written[1] == "writing train.beton: 1% (10,700 of 1,281,167), 30s, 59m30s left"


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    tqdm = pytest.importorskip("tqdm").tqdm
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    assert list(progress.tracked(range(3), "reading", 3)) == [0, 1, 2]
    assert "reading: 100%" in capsys.readouterr().err
    bar = progress.progress("reading", 3)
    assert isinstance(bar, tqdm)
    bar.close()


@pytest.mark.parametrize("on_terminal", [False, True])
def test_progress_bars_of_other_libraries_appear_only_on_a_terminal(monkeypatch, capsys, on_terminal):
    monkeypatch.setattr(progress, "on_terminal", lambda: on_terminal)
    with progress.without_foreign_bars():
        print("\r 50%", end="", file=sys.stderr)
    assert capsys.readouterr().err == ("\r 50%" if on_terminal else "")


def test_install_ffcv_script_names_missing_system_packages_and_succeeds(tmp_path):
    """Without a compiler, apt-get or ffcv the script exits with 0 and prints which packages to install."""
    import venv
    from pathlib import Path
    script = Path(__file__).resolve().parent.parent / "data_prep" / "install_ffcv.sh"
    venv.create(tmp_path / "venv", with_pip=True)
    (tmp_path / "bin").mkdir()
    for name in ("dirname", "id"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    process = subprocess.run(["/bin/sh", str(script), str(tmp_path / "venv/bin/pip")], capture_output=True, text=True,
                             env={"PATH": str(tmp_path / "bin")})
    assert process.returncode == 0, process.stderr
    assert "ffcv is left out" in process.stderr and "torchvision loader" in process.stderr
    assert "apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++" in process.stderr
