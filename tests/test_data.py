"""Order, augmentation and loaders: arithmetic of (seed, epoch, sample index), the same everywhere."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT, needs_ffcv

from nulsq.config import Data
from nulsq.data import DataSet, Normalize, build_loader, build_loaders
from nulsq.data.augment import apply_crop_and_flip, crop_and_flip, resized_crop
from nulsq.data.order import sharded, shuffled, split, subset
from nulsq.data.transform import Transform
from nulsq.errors import InputError

LABELS = np.repeat(np.arange(5), 40)


def epoch(loader, number, start=0):
    return [(images.clone(), labels.clone(), indices.clone()) for images, labels, indices in
            loader.epoch(number, start)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True)
                                    for x, y in zip(p, q, strict=True))


def test_stratified_holdout_takes_its_share_of_every_class():
    train, val = split(LABELS, "stratified:0.25", 3)
    assert len(np.intersect1d(train, val)) == 0 and len(train) + len(val) == len(LABELS)
    assert np.bincount(LABELS[val]).tolist() == [10] * 5
    assert not np.array_equal(val, split(LABELS, "stratified:0.25", 4)[1])
    assert np.array_equal(val, split(LABELS, "stratified:0.25", 3)[1])


def test_last_and_none():
    assert split(LABELS, "last:30", 0)[1].tolist() == list(range(170, 200))
    assert len(split(LABELS, "none", 0)[1]) == 0


@pytest.mark.parametrize("holdout", ["last:0", "last:200", "last:x", "stratified:0", "stratified:1", "random:0.1",
                                     "none:3"])
def test_a_holdout_that_makes_no_sense_names_the_allowed_forms(holdout):
    with pytest.raises(InputError, match="stratified:SHARE"):
        split(LABELS, holdout, 0)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_each_global_batch(size):
    indices = np.arange(103) * 3
    alone = shuffled(indices, 8, 5)(2)
    ranks = [shuffled(indices, 8, 5, rank, size)(2) for rank in range(size)]
    for step, batch in enumerate(alone):
        assert np.array_equal(np.concatenate([rank[step] for rank in ranks]), batch)
    assert len(alone) == 12 and len(np.unique(np.concatenate(alone))) == 96


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_evaluation_sees_every_image_exactly_once(size):
    indices = np.arange(50) + 1000
    seen = np.concatenate([np.concatenate(sharded(indices, 8, rank, size)(0)) for rank in range(size)])
    assert np.array_equal(np.sort(seen), indices)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [np.concatenate(shuffled(np.arange(64), 8, seed)(number)) for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_subset_is_seeded_and_bounded():
    assert np.array_equal(subset(np.arange(100), 10, 1), subset(np.arange(100), 10, 1))
    with pytest.raises(InputError, match="only 100"):
        subset(np.arange(100), 101, 1)


def test_crops_and_flips_are_uniform_and_depend_on_every_argument():
    indices = np.arange(20_000)
    top, left, flip = crop_and_flip(0, 0, indices, 4)
    for offsets in (top, left):
        counts = np.bincount(offsets, minlength=9)
        assert counts.shape == (9,) and abs(counts / 20_000 - 1 / 9).max() < 0.01  # 4.5 standard deviations
    assert abs(flip.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.03 and abs(np.corrcoef(top[:-1], top[1:])[0, 1]) < 0.03
    for seed, number in ((1, 0), (0, 1)):
        assert (crop_and_flip(seed, number, indices, 4)[0] != top).mean() > 0.8


def test_crop_and_flip_move_pixels_as_defined():
    images = np.random.default_rng(0).integers(1, 255, (6, 8, 8, 3), dtype=np.uint8)
    indices = np.arange(6) * 7
    out = apply_crop_and_flip(images, 3, 2, indices, 2, True)
    top, left, flip = crop_and_flip(3, 2, indices, 2)
    padded = np.zeros((6, 12, 12, 3), np.uint8)
    padded[:, 2:10, 2:10] = images
    for i in range(6):
        wanted = padded[i, top[i]:top[i] + 8, left[i]:left[i] + 8]
        assert np.array_equal(out[i], wanted[:, ::-1] if flip[i] else wanted)


def test_resized_crops_lie_inside_with_the_asked_shape():
    with np.errstate(over="ignore"):
        boxes = [resized_crop(np.uint64(0), np.uint64(0), np.uint64(i), 300, 400) for i in range(2000)]
    shares = np.array([h * w / 120_000 for _, _, h, w in boxes])
    assert all(top >= 0 and left >= 0 and top + h <= 300 and left + w <= 400 for top, left, h, w in boxes)
    assert shares.min() < 0.1 and shares.max() > 0.9
    assert all(0.7 < w / h < 1.43 for _, _, h, w in boxes)
    with np.errstate(over="ignore"):  # a strip, where no draw fits: the central crop of the nearest ratio
        assert resized_crop(np.uint64(0), np.uint64(0), np.uint64(0), 10, 1000) == (0, 493, 10, 13)


def loaders(digits, kind, workers=1, rank=0, size=1):
    recipe = Data(path=str(digits), batch=64, loader=kind, workers=workers, crop="pad", flip=True)
    return build_loaders(recipe, DataSet(digits), 7, rank, size)


@needs_ffcv
@pytest.mark.ffcv
@pytest.mark.parametrize("workers", [1, 2])
def test_ffcv_gives_the_same_pixels_as_torchvision(digits, workers):
    ffcv, plain = loaders(digits, "ffcv", workers), loaders(digits, "torchvision")
    assert (ffcv.loader_name, plain.loader_name) == ("ffcv", "torchvision")
    for number in (0, 3, 1):
        assert same(epoch(ffcv.train, number), epoch(plain.train, number))
    assert same(epoch(ffcv.val, 0), epoch(plain.val, 0))
    assert same(epoch(ffcv.train, 2, start=11), epoch(plain.train, 2)[11:])


@needs_ffcv
@pytest.mark.ffcv
def test_leaving_an_ffcv_epoch_early_leaves_no_thread(digits):
    import threading
    import time
    loader = loaders(digits, "ffcv").train
    before = threading.active_count()
    for _ in range(4):
        for _ in loader.epoch(0):
            break
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threading.active_count() <= before


@needs_ffcv
@pytest.mark.ffcv
def test_ffcv_leaves_torchs_threads_alone(digits):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loader = loaders(digits, "ffcv").train
        next(iter(loader.epoch(0)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_two_ranks_see_what_one_process_sees(digits):
    alone = epoch(loaders(digits, "torchvision").train, 1)
    ranks = [epoch(loaders(digits, "torchvision", rank=rank, size=2).train, 1) for rank in range(2)]
    for step, whole in enumerate(alone):
        for i, part in enumerate(whole):
            assert torch.equal(part, torch.cat([rank[step][i] for rank in ranks]))


def test_normalization_is_that_of_the_manifest(digits):
    data = DataSet(digits)
    images = torch.from_numpy(data.images("train")[:500].copy()).permute(0, 3, 1, 2)
    x = Normalize(data, torch.device("cpu"))(images)
    wanted = (images / 255 - torch.tensor(data.mean).view(1, 3, 1, 1)) / torch.tensor(data.std).view(1, 3, 1, 1)
    torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)


def test_holdout_and_test_are_what_the_recipe_says(digits):
    data, recipe = DataSet(digits), Data(path=str(digits), holdout="stratified:0.2", loader="torchvision")
    built = build_loaders(recipe, data, 0)
    train = torch.cat([indices for _, _, indices in built.train.epoch(0)])
    val = torch.cat([indices for _, _, indices in built.val.epoch(0)])
    assert not set(train.tolist()) & set(val.tolist())
    assert sum(len(labels) for _, labels, _ in build_loader(recipe, data, "test").epoch(0)) == data.counts["test"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest"])
def test_a_damaged_data_set_names_the_file(digits, tmp_path, damage):
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    victim = copy / "train_images.npy"
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim = copy / "manifest.json"
        victim.write_text(victim.read_text()[:100])
    with pytest.raises(InputError, match=victim.name):
        DataSet(copy)


@needs_ffcv
@pytest.mark.ffcv
def test_a_truncated_beton_is_named(digits, tmp_path):
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    os.truncate(copy / "train.beton", 1000)
    with pytest.raises(InputError, match="train.beton has 1000 bytes.*truncated or replaced"):
        DataSet(copy)


@pytest.mark.parametrize(("settings", "message"), [
    ({"crop": "resized"}, "is for photographs"),
    ({"batch": 100_000}, "more than the"),
    ({"holdout": "last:5000"}, "last:N with 0 < N"),
])
def test_a_recipe_that_does_not_fit_the_data(digits, settings, message):
    with pytest.raises(InputError, match=message):
        build_loaders(Data(path=str(digits), **settings), DataSet(digits), 0)


# ---- real photographs and CIFAR-10, where they are


real = pytest.mark.skipif("NULSQ_DATA" not in os.environ, reason="NULSQ_DATA names no folder of real images")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    from data_prep.__main__ import main
    out = tmp_path_factory.mktemp("photos") / "photos10"
    assert main(["folder", "--source", f"{os.environ['NULSQ_DATA']}/photos10", "--out", str(out)]) == 0
    return out


@real
def test_photographs_are_prepared_with_their_classes(photographs):
    data = DataSet(photographs)
    assert data.counts == {"train": 1000, "test": 400} and len(data.classes) == 10
    assert np.bincount(data.labels("train")).tolist() == [100] * 10


@real
@needs_ffcv
@pytest.mark.ffcv
def test_photographs_have_the_same_order_labels_boxes_and_flips_in_both_loaders(photographs):
    def build(kind, workers):
        recipe = Data(path=str(photographs), batch=20, loader=kind, workers=workers, crop="resized", flip=True,
                      size=64, subset=100)
        return build_loaders(recipe, DataSet(photographs), 1)
    plain, one, two = epoch(build("torchvision", 0).train, 1), epoch(build("ffcv", 1).train, 1), \
        epoch(build("ffcv", 2).train, 1)
    assert same(one, two)
    for a, b in zip(plain, one, strict=True):
        assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        # Decoders and resampling differ; another box or flip would be off by tens of grey levels.
        assert (a[0].float() - b[0].float()).abs().mean((1, 2, 3)).max() < 12


@real
@pytest.mark.slow
@needs_ffcv
@pytest.mark.ffcv
def test_cifar10_gives_the_same_pixels_in_both_loaders(tmp_path):
    import subprocess
    import sys

    from data_prep.__main__ import main
    unpack = Path(os.environ["NULSQ_DATA"]) / "unpack.py"
    subprocess.run([sys.executable, str(unpack), str(tmp_path / "source")], check=True, stdout=subprocess.DEVNULL)
    assert main(["cifar10", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "cifar10")]) == 0
    data = DataSet(tmp_path / "cifar10")
    assert data.counts == {"train": 50_000, "test": 10_000}
    assert data.mean == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-4)
    assert data.std == pytest.approx([0.24703, 0.24349, 0.26159], abs=1e-4)

    def build(kind):
        recipe = Data(path=str(data.path), batch=500, loader=kind, crop="pad", flip=True, holdout="last:5000")
        return build_loaders(recipe, data, 0)
    plain, ffcv = build("torchvision"), build("ffcv")
    for number in (0, 1):
        assert same(epoch(plain.train, number), epoch(ffcv.train, number))
    assert json.loads((data.path / "manifest.json").read_text())["classes"][3] == "cat"


# ---- sizes and orders of ImageNet's recipes


def test_photographs_grow_as_the_recipe_says():
    transform = Transform(0, "resized", 0, True, 192, 0.875, 160, (0.75, 0.875), 16)
    assert [transform.size_at(epoch) for epoch in (0, 11, 12, 13, 15)] == [160, 160, 192, 192, 192]
    slow = Transform(0, "resized", 0, True, 224, 0.875, 128, (0.3, 0.9), 10)
    assert [slow.size_at(epoch) for epoch in range(10)] == [128, 128, 128, 128, 160, 192, 192, 192, 224, 224]
    assert Transform(0, "resized", 0, True, 96, 0.875).size_at(7) == 96


@real
@pytest.mark.parametrize("kind", ["torchvision", pytest.param("ffcv", marks=[needs_ffcv, pytest.mark.ffcv])])
def test_a_loader_changes_its_size_between_epochs(photographs, kind):
    recipe = Data(path=str(photographs), batch=20, loader=kind, workers=1, crop="resized", size=96, start_size=32,
                  ramp_start=0.25, ramp_end=0.75, eval_size=64, subset=40, holdout="stratified:0.02")
    with pytest.raises(ValueError, match="build_loaders needs its number of epochs"):
        build_loaders(recipe, DataSet(photographs), 1)
    loaders = build_loaders(recipe, DataSet(photographs), 1, epochs=4)
    seen = [{tuple(images.shape[2:]) for images, _, _ in loaders.train.epoch(number)} for number in (0, 1, 2, 0)]
    assert seen == [{(32, 32)}, {(64, 64)}, {(96, 96)}, {(32, 32)}]
    assert {tuple(images.shape[2:]) for images, _, _ in loaders.val.epoch(0)} == {(64, 64)}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_windowed_order_is_shared_by_ranks_and_touches_few_neighbours_at_a_time(size):
    count, batch, window = 5000, 64, 1024
    ranks = [shuffled(np.arange(count), batch, 3, rank, size, window)(1) for rank in range(size)]
    steps = [np.concatenate(each) for each in zip(*ranks, strict=True)]
    alone = shuffled(np.arange(count), batch, 3, window=window)(1)
    assert all(np.array_equal(a, b) for a, b in zip(steps, alone, strict=True))
    seen = np.concatenate(steps)
    assert len(np.unique(seen)) == len(seen) == count // batch * batch
    for start in range(0, len(seen) - window, window):
        assert len(np.unique(seen[start:start + window] // 128)) <= 2 * window // 128  # the file's last chunk is short
    assert not np.array_equal(seen, np.concatenate(shuffled(np.arange(count), batch, 3, window=window)(2)))
    inside = seen[:window]
    assert abs(np.corrcoef(np.arange(window), np.argsort(np.argsort(inside)))[0, 1]) < 0.1  # mixed within a window


def test_evaluation_with_the_mirror_image_does_not_see_which_way_an_image_looks(short, float_run, digits):
    from nulsq.distributed import Ranks
    from nulsq.evaluate import evaluate
    from nulsq.models.network import build_network
    recipe, ranks = short("mirrored", **FLOAT, data__eval_flip=True, model__init_from=str(float_run)), Ranks(
        0, 1, torch.device("cpu"))
    data = DataSet(digits)
    model = build_network(recipe, 10)
    normalize = Normalize(data, ranks.device)
    loader = build_loader(recipe.data, data, "val")

    class Mirrored:
        steps = loader.steps

        def epoch(self, number):
            return ((images.flip(3), labels, indices) for images, labels, indices in loader.epoch(number))

    a, b = (evaluate(model, each, normalize, ranks, flip=True) for each in (loader, Mirrored()))
    assert a == pytest.approx(b, rel=1e-5)
    plain = evaluate(model, loader, normalize, ranks)
    assert plain["val_loss"] != pytest.approx(a["val_loss"], rel=1e-5)
