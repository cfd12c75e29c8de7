"""A quantizer whose process is killed when it is trained: what the system does to one that takes too much memory."""

import os
import signal

import torch

from nulsq.quantizers.lsq import LSQ


class Dying(LSQ):
    """Calibrated and counted like any other, it dies in its first training step."""

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
