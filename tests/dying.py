"""A quantizer that kills its process in training, as the system kills a process that uses too much memory."""

import os
import signal

import torch

from nulsq.quantizers.lsq import LSQ


class Dying(LSQ):
    """Can be calibrated and measured; the first training step kills the process."""

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
