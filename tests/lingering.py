"""LSQ whose run takes six seconds to release its folder after it has trained a step."""

import time

import torch

from nulsq.quantizers.lsq import LSQ
from nulsq.run.directory import RunDirectory

_release = RunDirectory.release


def _release_late(run: RunDirectory) -> None:
    time.sleep(6)
    _release(run)


class Lingering(LSQ):
    """LSQ that delays the end of its run; its output equals that of LSQ."""

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            RunDirectory.release = _release_late
        return super().forward(x)
