"""Accuracy of a trained network that is quantized and calibrated, and not trained: rows of `bench.initializers`.

The folder holds `squeezenet1_1_imagenet.pth`, a state dict of torchvision's network, `labels.csv` (file, class) and
`images/`. Calibrated on the first 100 images, evaluated on all.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import nulsq
from nulsq.data.photograph import read_rgb
from nulsq.errors import InputError
from nulsq.models.libraries import build_model
from nulsq.quant.settings import Policy, SideRule

WEIGHTS = "squeezenet1_1_imagenet.pth"
CALIBRATION, BATCH, CLASSES, SIZE = 100, 20, 1000, 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
# Bits, quantizer of the weights, one step per output channel, and how many points may be lost with `mse`.
SETTINGS = [(8, "lsq", False, 1), (6, "lsq", False, 7), (6, "lsq", True, 3), (4, "lsq", True, 58.3 - 28),
            (5, "nulsq", True, 5)]
INITIALIZERS = ("mse", "nmse")


def accuracy_rows(folder: Path) -> list[list[str]]:
    """Rows of a table, the header first: top-1 in percent of every setting with every initializer."""
    images, labels = read(folder)
    rows = [["weights / activations", "weight's steps", *INITIALIZERS, "float", "may lose with mse"]]
    as_float = top1(network(folder), images, labels)
    for bits, method, per_channel, points in SETTINGS:
        accuracies = [top1(quantized(network(folder), images, bits, method, per_channel, init), images, labels)
                      for init in INITIALIZERS]
        rows.append([f"W{bits}A{bits} {method} / nulsq", "per channel" if per_channel else "per tensor",
                     *(f"{value:.1f}" for value in accuracies), f"{as_float:.1f}", f"{points:.1f}"])
    return rows


def network(folder: Path) -> nn.Module:
    model = build_model("torchvision:squeezenet1_1", CLASSES)
    model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return model.eval()


def quantized(model: nn.Module, images: Tensor, bits: int, method: str, per_channel: bool, init: str) -> nn.Module:
    """At these bits in all layers, activations by nuLSQ."""
    policy = Policy(bits=bits, preset="none", weight=SideRule(method, per_channel=per_channel, init=init),
                    activation=SideRule("nulsq", init=init))
    return nulsq.calibrate_(nulsq.quantize_(model, policy), images[:CALIBRATION].split(BATCH))


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    hits = sum(int((model(x).argmax(1) == y).sum())
               for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True))
    return 100 * hits / len(labels)


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 224, 224], normalized, and labels [N]. Raises InputError for a folder that lacks a file."""
    for name in ("labels.csv", WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing")
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = torch.stack([_crop(folder / "images" / row["file"]) for row in rows])
    return images, torch.tensor([int(row["label"]) for row in rows])


def _crop(path: Path) -> Tensor:
    """The normalized central square of a photograph, [3, 224, 224]."""
    image = torch.from_numpy(np.array(read_rgb(path))).permute(2, 0, 1) / 255
    top, left = ((side - SIZE) // 2 for side in image.shape[1:])
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (image[:, top:top + SIZE, left:left + SIZE] - mean) / deviation
