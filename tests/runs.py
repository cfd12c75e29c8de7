"""Helpers for tests of runs: metrics without times, exact comparison of checkpoints, and runs with several ranks."""

import os
import subprocess
from pathlib import Path

import torch

import launch.local
from nulsq.config import to_yaml
from nulsq.run import checkpoint
from nulsq.run.directory import TIMES, read_metrics


def numbers(run: Path) -> list[dict]:
    """The metrics without times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]


def last(run: Path) -> dict:
    return checkpoint.load_chosen(run, "last")


def assert_same_state(a, b):
    """Assert that two nested structures are equal, tensors bit for bit; times are ignored."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - TIMES:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


def torchrun(recipe, path: Path, ranks: int, module="nulsq.train") -> subprocess.CompletedProcess:
    file = path / f"{recipe.name}.yaml"
    file.write_text(to_yaml(recipe))
    return in_ranks(ranks, module, str(file))


def in_ranks(ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch.local.torchrun(ranks), module, *arguments], capture_output=True, text=True,
                          timeout=300, env=environment)
