"""The loader on the device gives the other loaders' batches, bit for bit, without waiting for the host."""

import numpy as np
import pytest
import torch

from bench.counts import Waits
from nulsq.config import Data
from nulsq.data import DataSet, Normalize, build_loader, build_loaders, check_data
from nulsq.errors import InputError
from tests.conftest import needs_ffcv

CPU = torch.device("cpu")


def same(found, wanted):
    """Batch by batch: FFCV's live until its next one."""
    count = 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
        count += 1
    assert count


def loaders(digits, kind, rank=0, size=1, **settings):
    recipe = Data(path=str(digits), batch=64, loader=kind, **settings)
    return build_loaders(recipe, DataSet(digits), 7, rank, size)


@pytest.mark.parametrize("other", ["torchvision", pytest.param("ffcv", marks=needs_ffcv)])
@pytest.mark.parametrize("settings", [
    {"crop": "pad", "flip": True}, {"crop": "pad", "padding": 1}, {"flip": True}, {},
    {"crop": "pad", "flip": True, "subset": 200}])
def test_batches_are_those_of_the_other_loaders(digits, settings, other):
    ours, theirs = loaders(digits, "device", **settings), loaders(digits, other, **settings)
    assert ours.kind == "device" and ours.train.steps == theirs.train.steps
    for epoch in (0, 3):
        same(ours.train.epoch(epoch), theirs.train.epoch(epoch))
    same(ours.val.epoch(0), theirs.val.epoch(0))


def test_ranks_and_a_start_within_the_epoch(digits):
    for rank in range(2):
        ours, theirs = (loaders(digits, kind, rank, 2, crop="pad", flip=True) for kind in ("device", "torchvision"))
        same(ours.train.epoch(1, 3), theirs.train.epoch(1, 3))
        same(ours.val.epoch(0), theirs.val.epoch(0))
    assert list(ours.train.epoch(0, ours.train.steps)) == []


@pytest.mark.parametrize("which", ["test", "val"])
def test_evaluation_shows_every_image_once(digits, which):
    data, made = DataSet(digits), []
    for kind in ("device", "torchvision"):
        made.append(build_loader(Data(path=str(digits), batch=100, loader=kind), data, which))
    same(made[0].epoch(0), made[1].epoch(0))


def test_an_epoch_reads_no_number_back(digits):
    """On a GPU each read would stop the queue; what is copied per epoch is copied before its first step."""
    loader, normalize = loaders(digits, "device", crop="pad", flip=True).train, Normalize(DataSet(digits), CPU)
    with Waits() as waits:
        for images, _, _ in loader.epoch(0):
            normalize(images)
    assert waits.count == 0


def test_batches_can_be_kept_and_changed(digits):
    """They are no views of the images: training in place on one does not change the next epoch."""
    loader = loaders(digits, "device").train
    before = [images.clone() for images, _, _ in loader.epoch(0)]
    for images, labels, _ in loader.epoch(0):
        images.zero_()
        labels.zero_()
    same(([images] for images, _, _ in loader.epoch(0)), ([images] for images in before))


def test_auto_takes_the_device_where_the_images_fit(digits, monkeypatch):
    data, recipe = DataSet(digits), Data(path=str(digits))
    assert check_data(recipe, data) == "device"
    monkeypatch.setattr("nulsq.data._room", lambda device: 1000)
    assert check_data(recipe, data) in ("ffcv", "torchvision")
    with pytest.raises(InputError, match="device: the images need .* GB, half of what is free on cpu is 0.00"):
        check_data(Data(path=str(digits), loader="device"), data)


def test_photographs_stay_with_the_other_loaders():
    class Photographs:
        kind, path = "files", "data/photographs"

        def labels(self, split):
            return np.arange(500) % 5

        def beton(self, split):
            return None

    with pytest.raises(InputError, match="device is for small equal images .arrays., data/photographs has photographs"):
        check_data(Data(loader="device"), Photographs())
    assert check_data(Data(), Photographs()) == "torchvision"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_no_step_synchronizes(digits):
    data, device = DataSet(digits), torch.device("cuda")
    recipe = Data(path=str(digits), batch=64, crop="pad", flip=True)
    ours, theirs = (build_loaders(recipe, data, 7, device=where).train for where in (device, CPU))
    found, normalize = [], Normalize(data, device)
    steps = ours.epoch(0)
    found.append(next(steps))  # copies the epoch's order
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in steps:
            normalize(batch[0])
            found.append(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(([each.cpu() for each in batch] for batch in found), theirs.epoch(0))
