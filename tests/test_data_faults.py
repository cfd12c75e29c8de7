"""Bad data gives a clear error: files that are not photographs, damaged .beton files, pipelines that fail or stall."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_ffcv
from PIL import Image

from data_prep.__main__ import main
from nulsq.config import Data, Recipe, load
from nulsq.data import DataSet, beton_format, build_loaders
from nulsq.data.photograph import read_rgb
from nulsq.errors import ExitCode, InputError


def photograph(seed, height=40, width=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def save_png_with_false_size(path, width, height):
    """Save a small PNG whose header states this size."""
    photograph(0).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.fixture
def source(tmp_path):
    """Two classes of twenty valid photographs each, and five images of unusual modes and formats."""
    root = tmp_path / "source"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(20):
            photograph(i).save(root / label / f"{i:02d}.jpg", quality=95)
    photograph(0).convert("L").save(root / "cat" / "grey.jpg")
    photograph(0).convert("CMYK").save(root / "cat" / "cmyk.jpg")
    photograph(0).convert("RGBA").save(root / "dog" / "rgba.png")
    Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29).save(root / "dog" / "deep.png")
    photograph(1).save(root / "dog" / "a_png.JPEG", format="png")  # ImageNet has one
    return root


@pytest.fixture
def faulty(source):
    """Adds one file with each fault to `source`; file name -> part of the reason."""
    whole = (source / "cat" / "00.jpg").read_bytes()
    (source / "cat" / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "dog" / "text.jpg").write_text("not an image")
    (source / "dog" / "notes.txt").write_text("no image suffix")
    save_png_with_false_size(source / "dog" / "huge.png", 60_000, 60_000)
    return {"cat/truncated.jpg": "truncated", "cat/empty.jpg": "the file is empty", "dog/text.jpg": "not an image",
            "dog/notes.txt": "not named as an image", "dog/huge.png": "3600000000 pixels"}


def prepare(source, out, *options):
    return main(["folder", "--source", str(source), "--out", str(out), "--workers", "2", *options])


def test_preparation_names_every_faulty_file_with_its_reason_and_writes_nothing(source, faulty, tmp_path, capsys):
    assert prepare(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    for path, reason in faulty.items():
        assert any(line.startswith(f"{path}: ") and reason in line for line in error.splitlines()), (path, error)
    assert "5 of 50 files cannot be used" in error and "--on-error skip" in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_on_error_skip_leaves_out_faulty_files_and_returns_its_own_exit_code(source, faulty, tmp_path, capsys):
    assert prepare(source, tmp_path / "out", "--on-error", "skip") == 2
    assert "more than --max-skipped = 0.01" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert prepare(source, tmp_path / "out", "--on-error", "skip", "--max-skipped", "0.2") == ExitCode.FILES_SKIPPED
    assert ExitCode.FILES_SKIPPED == 6
    data = DataSet(tmp_path / "out")
    assert sum(data.counts.values()) == 45
    skipped = (tmp_path / "out" / "skipped.txt").read_text()
    assert all(path in skipped for path in faulty) and len(skipped.splitlines()) == 5
    assert main(["check", str(tmp_path / "out")]) == 0


def test_grey_cmyk_rgba_and_16_bit_images_are_converted_to_rgb(source):
    deep = np.asarray(read_rgb(source / "dog" / "deep.png"))
    assert deep.shape == (40, 56, 3)
    assert np.array_equal(deep[..., 0], (np.arange(40 * 56).reshape(40, 56) * 29 >> 8).astype(np.uint8))
    assert np.array_equal(np.asarray(read_rgb(source / "dog" / "rgba.png")), np.asarray(photograph(0)))
    for name in ("cat/grey.jpg", "cat/cmyk.jpg", "dog/a_png.JPEG"):
        assert read_rgb(source / name).mode == "RGB"


def test_killed_preparation_leaves_no_data_set_that_looks_finished(source, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "folder", "--source", str(source), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.unfinished-*/*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and list(tmp_path.glob(".out.unfinished-*"))
    with pytest.raises(InputError, match="not a prepared data set"):
        DataSet(out)
    assert prepare(source, out) == 0
    assert not list(tmp_path.glob(".out.unfinished-*")) and main(["check", str(out)]) == 0


# ---- .beton files


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """A prepared data set of photographs, all stored as JPEG."""
    pytest.importorskip("ffcv")
    root = tmp_path_factory.mktemp("beton")
    for label in ("cat", "dog"):
        (root / "source" / label).mkdir(parents=True)
        for i in range(20):
            photograph(i).save(root / "source" / label / f"{i:02d}.png")
    assert prepare(root / "source", root / "out", "--write-mode", "jpg") == 0
    return root / "out"


@pytest.fixture
def copy(beton, tmp_path):
    shutil.copytree(beton, tmp_path / "copy")
    return tmp_path / "copy"


def loader(path, **settings):
    recipe = Data(path=str(path), batch=8, loader="ffcv", crop="resized", size=32, **{"holdout": "none"} | settings)
    return build_loaders(recipe, DataSet(path), 0).train


def patch(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_check_verifies_the_checksum_and_decodes_every_sample(beton, copy, capsys):
    assert main(["check", str(beton / "train.beton")]) == 0
    assert "32 samples, 2 labels, checksum and labels as written, every sample decoded" in capsys.readouterr().out
    alone = copy.parent / "alone.beton"
    shutil.copyfile(beton / "train.beton", alone)
    assert main(["check", str(alone)]) == 0
    assert "checksum unknown: no manifest.json next to it" in capsys.readouterr().out
    file = beton_format.read(alone)
    patch(alone, int(file.samples["start"][5]), b"\0\0\0\0")
    assert main(["check", str(alone)]) == 2
    assert "1 samples cannot be decoded: 5" in capsys.readouterr().err
    patch(copy / "train.beton", int(file.samples["start"][5]), b"\0\0\0\0")
    assert main(["check", str(copy / "train.beton")]) == 2
    assert "the checksum is not the one" in capsys.readouterr().err


@pytest.mark.parametrize(("offset", "content", "message"), [
    (0, (7).to_bytes(2, "little"), "is no .beton file of version 2"),
    (2, (9).to_bytes(2, "little"), "has 9 fields"),
    (8, (10**12).to_bytes(8, "little"), "is truncated"),
    (8, (5).to_bytes(8, "little"), "has other labels than the data set"),
    (24, b"\5", "does not hold an image and a label"),
    (24 + 2 * 1041 + 1, b"\x39\0", "its records are not those that were written"),  # changes a width by 1
    (24 + 2 * 1041 + 5, b"\xff" * 7, "the record of sample 0 is impossible"),
])
def test_error_for_invalid_beton_names_the_file(copy, offset, content, message):
    patch(copy / "train.beton", offset, content)
    with pytest.raises(InputError, match=message) as error:
        list(loader(copy).epoch(0))
    assert "train.beton" in str(error.value)


@needs_ffcv
@pytest.mark.ffcv
def test_ffcv_loader_error_for_damaged_photograph_names_the_sample(copy):
    """FFCV ignores the error code of its decoder and would return the pixels of another image."""
    file = beton_format.read(copy / "train.beton")
    patch(copy / "train.beton", int(file.samples["start"][17]), b"\0\0\0\0")
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"train.beton: the photograph of sample 17 is damaged"):
            list(loader(copy, workers=workers).epoch(0))
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "_EpochThread"]


def test_torchvision_loader_error_for_damaged_photograph_names_the_sample(source, tmp_path):
    assert prepare(source, tmp_path / "out") == 0
    data = DataSet(tmp_path / "out")
    damaged_file = data.paths("train")[11]
    damaged_file.write_bytes(damaged_file.read_bytes()[:300])
    for workers in (0, 1):
        recipe = Data(path=str(tmp_path / "out"), batch=8, loader="torchvision", crop="resized", size=32,
                      holdout="none", workers=workers)
        with pytest.raises(InputError) as error:
            list(build_loaders(recipe, data, 0).train.epoch(0))
        assert str(error.value).startswith(f"sample 11 is damaged: {damaged_file}: ") and "\n" not in str(error.value)


@needs_ffcv
@pytest.mark.ffcv
def test_beton_replaced_during_an_epoch_is_an_error(copy, beton):
    train = loader(copy)
    epoch = train.epoch(0)
    next(epoch)
    shutil.copyfile(beton / "train.beton", copy / "new.beton")
    (copy / "new.beton").replace(copy / "train.beton")
    with pytest.raises(InputError, match="train.beton was replaced or changed while it was in use"):
        next(epoch)
    with pytest.raises(InputError, match="was replaced"):
        next(train.epoch(1))


@needs_ffcv
@pytest.mark.ffcv
@pytest.mark.parametrize("fault", ["exception", "stall"])
def test_failing_or_stalling_ffcv_pipeline_is_an_error(beton, monkeypatch, fault):
    from ffcv.loader.epoch_iterator import EpochIterator
    original, release = EpochIterator.run_pipeline, threading.Event()

    def run_pipeline(self, number, indices, *rest):
        if number == 1:
            if fault == "exception":
                raise MemoryError("no room")
            release.wait(30)
        return original(self, number, indices, *rest)

    train = loader(beton)
    list(train.epoch(0))  # compiles, which takes longer than the patience below
    train.patience = 1.0
    monkeypatch.setattr(EpochIterator, "run_pipeline", run_pipeline)
    epoch = train.epoch(0)
    _, _, indices = next(epoch)
    message = "MemoryError in the loader at batch 1 of 4, samples .*: no room" if fault == "exception" else \
        "the loader's thread gave nothing for 1 seconds, at batch 1 of 4, samples"
    with pytest.raises(InputError, match=message):
        next(epoch)
    release.set()
    monkeypatch.undo()
    assert len(list(train.epoch(0))) == 4  # the loader works again


@needs_ffcv
@pytest.mark.ffcv
def test_epochs_left_early_leave_no_thread(beton):
    train = loader(beton)
    before = threading.active_count()
    for number in range(12):
        for step, _ in enumerate(train.epoch(number)):
            if step == number % 3:
                break
    assert threading.active_count() == before


# ---- damaged bytes

FUZZ = """
import dataclasses, random, sys
from pathlib import Path
import numpy as np
from nulsq.config import Data
from nulsq.data import DataSet, beton_format, build_loaders
from nulsq.errors import ExitCode, InputError
path, draw, loaded, refused = Path(sys.argv[1]) / "train.beton", random.Random(0), 0, 0
whole = path.read_bytes()
file = beton_format.read(path)
structure = 24 + 2 * 1041 + len(file.samples) * 24
table = int.from_bytes(whole[16:24], "little")
for round in range(400):
    damaged = bytearray(whole)
    for _ in range(draw.choice((1, 2, 8))):
        place = draw.choice((draw.randrange(24), draw.randrange(structure), draw.randrange(table, len(whole)),
                             draw.randrange(len(whole))))
        damaged[place] = draw.randrange(256)
    path.write_bytes(damaged)
    try:
        beton_format.read(path)
        if loaded < 3 and draw.random() < 0.2:  # FFCV loads a file that passes the check
            loaded += 1
            recipe = Data(path=str(path.parent), batch=8, loader="ffcv", crop="resized", size=32, holdout="none")
            data = DataSet(path.parent)
            data.files["train.beton"] = dataclasses.replace(data.files["train.beton"], records=None)  # no check
            list(build_loaders(recipe, data, 0).train.epoch(0))
    except InputError:
        refused += 1
print(loaded, refused)
"""


@needs_ffcv
@pytest.mark.ffcv
def test_randomly_damaged_beton_files_are_errors_and_never_crash(copy):
    process = subprocess.run([sys.executable, "-c", FUZZ, str(copy)], cwd=ROOT, capture_output=True, text=True,
                             timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    loaded, refused = map(int, process.stdout.split()[-2:])
    assert loaded >= 3 and refused > 100


def test_randomly_damaged_recipes_are_errors(tmp_path):
    draw, read, refused = random.Random(0), 0, 0
    whole = (ROOT / "configs/recipes/cifar10/w2a2.yaml").read_bytes()
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 4))):
            place = draw.randrange(len(damaged))
            damaged[place:place + draw.choice((0, 1, 3))] = bytes([draw.randrange(256)])
        (tmp_path / "r.yaml").write_bytes(damaged)
        try:
            assert isinstance(load(Recipe, tmp_path / "r.yaml"), Recipe)
            read += 1
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert read > 5 and refused > 25


def test_image_file_truncated_after_opening_is_an_error(digits, tmp_path):
    """Images are mapped from disk: reading past the end of a truncated file would kill the process."""
    path = Path(shutil.copytree(digits, tmp_path / "digits"))
    data = DataSet(path)
    train = build_loaders(Data(path=str(path), batch=32), data, 0).train
    assert train.images.dtype == torch.uint8
    os.truncate(path / "train_images.npy", 5000)
    with pytest.raises(InputError, match="train_images.npy was replaced or changed while it was in use"):
        list(train.epoch(0))
