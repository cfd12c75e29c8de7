"""Order, augmentation and loaders: each depends only on (seed, epoch, sample index), on every loader and rank."""

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


def test_last_and_none_holdouts():
    assert split(LABELS, "last:30", 0)[1].tolist() == list(range(170, 200))
    assert len(split(LABELS, "none", 0)[1]) == 0


@pytest.mark.parametrize("holdout", ["last:0", "last:200", "last:x", "stratified:0", "stratified:1", "random:0.1",
                                     "none:3"])
def test_error_for_invalid_holdout_lists_the_allowed_forms(holdout):
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


def test_every_epoch_and_seed_has_a_different_order():
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


def test_crop_and_flip_equal_padding_slicing_and_mirroring():
    images = np.random.default_rng(0).integers(1, 255, (6, 8, 8, 3), dtype=np.uint8)
    indices = np.arange(6) * 7
    out = apply_crop_and_flip(images, 3, 2, indices, 2, True)
    top, left, flip = crop_and_flip(3, 2, indices, 2)
    padded = np.zeros((6, 12, 12, 3), np.uint8)
    padded[:, 2:10, 2:10] = images
    for i in range(6):
        expected = padded[i, top[i]:top[i] + 8, left[i]:left[i] + 8]
        assert np.array_equal(out[i], expected[:, ::-1] if flip[i] else expected)


def test_resized_crops_lie_inside_the_image_with_valid_area_and_aspect_ratio():
    with np.errstate(over="ignore"):
        boxes = [resized_crop(np.uint64(0), np.uint64(0), np.uint64(i), 300, 400) for i in range(2000)]
    areas = np.array([h * w / 120_000 for _, _, h, w in boxes])
    assert all(top >= 0 and left >= 0 and top + h <= 300 and left + w <= 400 for top, left, h, w in boxes)
    assert areas.min() < 0.1 and areas.max() > 0.9
    assert all(0.7 < w / h < 1.43 for _, _, h, w in boxes)
    with np.errstate(over="ignore"):  # no draw fits into a strip: the central crop with the nearest aspect ratio
        assert resized_crop(np.uint64(0), np.uint64(0), np.uint64(0), 10, 1000) == (0, 493, 10, 13)


def loaders(digits, kind, workers=1, rank=0, size=1):
    recipe = Data(path=str(digits), batch=64, loader=kind, workers=workers, crop="pad", flip=True)
    return build_loaders(recipe, DataSet(digits), 7, rank, size)


@needs_ffcv
@pytest.mark.ffcv
@pytest.mark.parametrize("workers", [1, 2])
def test_ffcv_and_torchvision_loaders_give_the_same_pixels(digits, workers):
    ffcv, plain = loaders(digits, "ffcv", workers), loaders(digits, "torchvision")
    assert (ffcv.loader_name, plain.loader_name) == ("ffcv", "torchvision")
    for number in (0, 3, 1):
        assert same(epoch(ffcv.train, number), epoch(plain.train, number))
    assert same(epoch(ffcv.val, 0), epoch(plain.val, 0))
    assert same(epoch(ffcv.train, 2, start=11), epoch(plain.train, 2)[11:])


@needs_ffcv
@pytest.mark.ffcv
def test_ffcv_epoch_left_early_leaves_no_thread(digits):
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
def test_ffcv_does_not_change_the_thread_count_of_torch(digits):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loader = loaders(digits, "ffcv").train
        next(iter(loader.epoch(0)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_two_ranks_together_see_the_batches_of_one_process(digits):
    alone = epoch(loaders(digits, "torchvision").train, 1)
    ranks = [epoch(loaders(digits, "torchvision", rank=rank, size=2).train, 1) for rank in range(2)]
    for step, whole in enumerate(alone):
        for i, part in enumerate(whole):
            assert torch.equal(part, torch.cat([rank[step][i] for rank in ranks]))


def test_normalization_uses_mean_and_std_of_the_manifest(digits):
    data = DataSet(digits)
    images = torch.from_numpy(data.images("train")[:500].copy()).permute(0, 3, 1, 2)
    x = Normalize(data, torch.device("cpu"))(images)
    expected = (images / 255 - torch.tensor(data.mean).view(1, 3, 1, 1)) / torch.tensor(data.std).view(1, 3, 1, 1)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_holdout_is_disjoint_from_training_and_test_split_is_complete(digits):
    data, recipe = DataSet(digits), Data(path=str(digits), holdout="stratified:0.2", loader="torchvision")
    built = build_loaders(recipe, data, 0)
    train = torch.cat([indices for _, _, indices in built.train.epoch(0)])
    val = torch.cat([indices for _, _, indices in built.val.epoch(0)])
    assert not set(train.tolist()) & set(val.tolist())
    assert sum(len(labels) for _, labels, _ in build_loader(recipe, data, "test").epoch(0)) == data.counts["test"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest"])
def test_error_for_damaged_data_set_names_the_file(digits, tmp_path, damage):
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    damaged_file = copy / "train_images.npy"
    if damage == "missing":
        damaged_file.unlink()
    elif damage == "truncated":
        os.truncate(damaged_file, damaged_file.stat().st_size // 2)
    else:
        damaged_file = copy / "manifest.json"
        damaged_file.write_text(damaged_file.read_text()[:100])
    with pytest.raises(InputError, match=damaged_file.name):
        DataSet(copy)


@needs_ffcv
@pytest.mark.ffcv
def test_error_for_truncated_beton_names_the_file(digits, tmp_path):
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
def test_recipe_that_does_not_fit_the_data_is_an_error(digits, settings, message):
    with pytest.raises(InputError, match=message):
        build_loaders(Data(path=str(digits), **settings), DataSet(digits), 0)


# ---- real photographs and CIFAR-10, if NULSQ_DATA names them


real = pytest.mark.skipif("NULSQ_DATA" not in os.environ, reason="NULSQ_DATA names no folder of real images")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    from data_prep.__main__ import main
    out = tmp_path_factory.mktemp("photos") / "photos10"
    assert main(["folder", "--source", f"{os.environ['NULSQ_DATA']}/photos10", "--out", str(out)]) == 0
    return out


@real
def test_prepared_photographs_keep_their_classes(photographs):
    data = DataSet(photographs)
    assert data.counts == {"train": 1000, "test": 400} and len(data.classes) == 10
    assert np.bincount(data.labels("train")).tolist() == [100] * 10


@real
@needs_ffcv
@pytest.mark.ffcv
def test_ffcv_and_torchvision_agree_on_order_labels_boxes_and_flips_of_photographs(photographs):
    def build(kind, workers):
        recipe = Data(path=str(photographs), batch=20, loader=kind, workers=workers, crop="resized", flip=True,
                      size=64, subset=100)
        return build_loaders(recipe, DataSet(photographs), 1)
    plain, one, two = epoch(build("torchvision", 0).train, 1), epoch(build("ffcv", 1).train, 1), \
        epoch(build("ffcv", 2).train, 1)
    assert same(one, two)
    for a, b in zip(plain, one, strict=True):
        assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        # Decoders and resampling differ; a different box or flip would change pixels by tens of grey levels.
        assert (a[0].float() - b[0].float()).abs().mean((1, 2, 3)).max() < 12


@real
@pytest.mark.slow
@needs_ffcv
@pytest.mark.ffcv
def test_ffcv_and_torchvision_give_the_same_pixels_of_cifar10(tmp_path):
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


def test_image_size_grows_between_the_ends_of_the_ramp():
    transform = Transform(0, "resized", 0, True, 192, 0.875, 160, (0.75, 0.875), 16)
    assert [transform.size_at(epoch) for epoch in (0, 11, 12, 13, 15)] == [160, 160, 192, 192, 192]
    slow = Transform(0, "resized", 0, True, 224, 0.875, 128, (0.3, 0.9), 10)
    assert [slow.size_at(epoch) for epoch in range(10)] == [128, 128, 128, 128, 160, 192, 192, 192, 224, 224]
    assert Transform(0, "resized", 0, True, 96, 0.875).size_at(7) == 96


@real
@pytest.mark.parametrize("kind", ["torchvision", pytest.param("ffcv", marks=[needs_ffcv, pytest.mark.ffcv])])
def test_loader_changes_the_image_size_between_epochs(photographs, kind):
    recipe = Data(path=str(photographs), batch=20, loader=kind, workers=1, crop="resized", size=96, start_size=32,
                  ramp_start=0.25, ramp_end=0.75, eval_size=64, subset=40, holdout="stratified:0.02")
    with pytest.raises(ValueError, match="build_loaders needs its number of epochs"):
        build_loaders(recipe, DataSet(photographs), 1)
    loaders = build_loaders(recipe, DataSet(photographs), 1, epochs=4)
    seen = [{tuple(images.shape[2:]) for images, _, _ in loaders.train.epoch(number)} for number in (0, 1, 2, 0)]
    assert seen == [{(32, 32)}, {(64, 64)}, {(96, 96)}, {(32, 32)}]
    assert {tuple(images.shape[2:]) for images, _, _ in loaders.val.epoch(0)} == {(64, 64)}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_windowed_order_is_shared_by_ranks_and_reads_few_chunks_per_window(size):
    count, batch, window = 5000, 64, 1024
    ranks = [shuffled(np.arange(count), batch, 3, rank, size, window)(1) for rank in range(size)]
    steps = [np.concatenate(parts) for parts in zip(*ranks, strict=True)]
    alone = shuffled(np.arange(count), batch, 3, window=window)(1)
    assert all(np.array_equal(a, b) for a, b in zip(steps, alone, strict=True))
    seen = np.concatenate(steps)
    assert len(np.unique(seen)) == len(seen) == count // batch * batch
    for start in range(0, len(seen) - window, window):
        assert len(np.unique(seen[start:start + window] // 128)) <= 2 * window // 128  # the last chunk is short
    assert not np.array_equal(seen, np.concatenate(shuffled(np.arange(count), batch, 3, window=window)(2)))
    first_window = seen[:window]
    assert abs(np.corrcoef(np.arange(window), np.argsort(np.argsort(first_window)))[0, 1]) < 0.1  # well mixed


def test_evaluation_with_eval_flip_gives_the_same_metrics_for_mirrored_images(short, float_run, digits):
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

    original, mirrored = (evaluate(model, images, normalize, ranks, flip=True) for images in (loader, Mirrored()))
    assert original == pytest.approx(mirrored, rel=1e-5)
    plain = evaluate(model, loader, normalize, ranks)
    assert plain["val_loss"] != pytest.approx(original["val_loss"], rel=1e-5)
