"""A quantizer whose run takes six seconds to end, once it has trained a step."""

import time

import torch

from nulsq.quantizers.lsq import LSQ
from nulsq.run.directory import RunDirectory

_release = RunDirectory.release


def _late(run: RunDirectory) -> None:
    time.sleep(6)
    _release(run)


class Lingering(LSQ):
    """Computes what LSQ computes."""

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            RunDirectory.release = _late
        return super().forward(x)
