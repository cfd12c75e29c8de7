"""The loader on the device gives the other loaders' batches, bit for bit, without waiting for the host."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_ffcv

from bench.counts import Waits
from nulsq.config import Data
from nulsq.data import DataSet, Normalize, build_loader, build_loaders, check_data
from nulsq.data.memory_loader import MemoryLoader
from nulsq.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """1,100 images that are not grey and square like the digits: of CIFAR-10 if available, otherwise tall noise."""
    from data_prep.writing import write_arrays
    if "NULSQ_DATA" in os.environ:
        from PIL import Image
        with Image.open(Path(os.environ["NULSQ_DATA"]) / "cifar10" / "data_batch_1.webp") as grid:  # 100 x 100 images
            pixels = np.asarray(grid.convert("RGB")).reshape(100, 32, 100, 32, 3)
        images = pixels.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)[:1100]
    else:
        images = np.random.default_rng(0).integers(0, 256, (1100, 24, 20, 3), dtype=np.uint8)
    labels = np.arange(1100) % 10
    return write_arrays(tmp_path_factory.mktemp("data") / "colours", name="colours", classes=list("0123456789"),
                        source="a test", images={"train": images[:1000], "test": images[1000:]},
                        labels={"train": labels[:1000], "test": labels[1000:]})


def assert_same_batches(actual, expected):
    """Compare one batch at a time, because FFCV reuses the memory of a batch for the next one."""
    count = 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
        count += 1
    assert count


def loaders(digits, kind, rank=0, size=1, **settings):
    recipe = Data(path=str(digits), batch=64, loader=kind, **settings)
    return build_loaders(recipe, DataSet(digits), 7, rank, size)


@pytest.mark.parametrize("other", ["torchvision", pytest.param("ffcv", marks=[needs_ffcv, pytest.mark.ffcv])])
@pytest.mark.parametrize("settings", [
    {"crop": "pad", "flip": True}, {"crop": "pad", "padding": 1}, {"flip": True}, {},
    {"crop": "pad", "flip": True, "subset": 200}])
@pytest.mark.parametrize("images", ["digits", "colours"])
def test_device_loader_gives_the_batches_of_the_other_loaders(images, settings, other, request):
    path = request.getfixturevalue(images)
    ours, theirs = loaders(path, "device", **settings), loaders(path, other, **settings)
    assert (ours.loader_name, theirs.loader_name) == ("device", other) and ours.train.steps == theirs.train.steps
    for epoch in (0, 3):
        assert_same_batches(ours.train.epoch(epoch), theirs.train.epoch(epoch))
    assert_same_batches(ours.val.epoch(0), theirs.val.epoch(0))


def test_device_loader_with_two_ranks_and_a_start_within_the_epoch(colours):
    for rank in range(2):
        ours, theirs = (loaders(colours, kind, rank, 2, crop="pad", flip=True) for kind in ("device", "torchvision"))
        assert_same_batches(ours.train.epoch(0), theirs.train.epoch(0))
        assert_same_batches(ours.train.epoch(1, 3), theirs.train.epoch(1, 3))
        assert_same_batches(ours.val.epoch(0), theirs.val.epoch(0))
    assert list(ours.train.epoch(0, ours.train.steps)) == []


def test_loader_with_only_the_used_images_gives_the_same_batches(colours):
    whole = loaders(colours, "device", crop="pad", flip=True, subset=200).train
    used = np.unique(torch.cat([indices for _, _, indices in whole.epoch(0)]).numpy())
    part = MemoryLoader(DataSet(colours), "train", whole.order, whole.transform, CPU, used)
    assert len(part.images) == len(used) < len(whole.images)
    assert_same_batches(part.epoch(0), whole.epoch(0))


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluation_shows_every_image_once(digits, split):
    data = DataSet(digits)
    ours, theirs = (build_loader(Data(path=str(digits), batch=100, loader=kind), data, split)
                    for kind in ("device", "torchvision"))
    assert_same_batches(ours.epoch(0), theirs.epoch(0))


def test_epoch_does_not_read_values_back_from_the_device(digits):
    """On a GPU each read would wait for the queue; the order of an epoch is copied before its first step."""
    loader, normalize = loaders(digits, "device", crop="pad", flip=True).train, Normalize(DataSet(digits), CPU)
    with Waits() as waits:
        for images, _, _ in loader.epoch(0):
            normalize(images)
    assert waits.count == 0


def test_in_place_changes_of_batches_do_not_change_the_images(digits):
    """Batches are not views of the images, so a change does not affect the next epoch."""
    loader = loaders(digits, "device").train
    before = [images.clone() for images, _, _ in loader.epoch(0)]
    for images, labels, _ in loader.epoch(0):
        images.zero_()
        labels.zero_()
    assert_same_batches(([images] for images, _, _ in loader.epoch(0)), ([images] for images in before))


def test_auto_selects_the_device_loader_on_the_cpu_and_on_a_gpu_with_enough_memory(digits, monkeypatch):
    data, recipe, explicit = DataSet(digits), Data(path=str(digits)), Data(path=str(digits), loader="device")
    needed = data.images("train").nbytes
    assert check_data(recipe, data, device=CPU) == "device"

    def set_free_memory(count, reserved=0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (count, 10 * needed))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)

    set_free_memory(2 * needed)
    assert check_data(recipe, data, device=CUDA) == check_data(explicit, data, device=CUDA) == "device"
    set_free_memory(needed, reserved=needed)  # torch keeps memory of a network trained before
    assert check_data(recipe, data, device=CUDA) == "device"
    set_free_memory(2 * needed - 2)
    assert check_data(recipe, data, device=CUDA) == ("ffcv" if data.beton("train") else "torchvision")
    assert check_data(explicit, data, device=CUDA, split_name="test") == "device"  # the test split is smaller
    with pytest.raises(InputError, match="device: the images need .* GB, half of what is free on cuda is .* GB; "
                                         "allowed: auto, ffcv, torchvision"):
        check_data(explicit, data, device=CUDA)


def test_device_loader_rejects_photographs_and_auto_selects_torchvision_for_them():
    class Photographs:
        storage, path = "files", "data/photographs"

        def labels(self, split):
            return np.arange(500) % 5

        def beton(self, split):
            return None

    with pytest.raises(InputError, match="device is for small equal images .arrays., data/photographs has photographs"):
        check_data(Data(loader="device"), Photographs())
    assert check_data(Data(), Photographs()) == "torchvision"


@pytest.mark.gpu
def test_steps_on_a_gpu_do_not_synchronize(digits):
    data, device = DataSet(digits), CUDA
    recipe = Data(path=str(digits), batch=64, crop="pad", flip=True)
    ours, theirs = (build_loaders(recipe, data, 7, device=place).train for place in (device, CPU))
    batches, normalize = [], Normalize(data, device)
    steps = ours.epoch(0)
    batches.append(next(steps))  # copies the epoch's order
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in steps:
            normalize(batch[0])
            batches.append(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_batches(([tensor.cpu() for tensor in batch] for batch in batches), theirs.epoch(0))
