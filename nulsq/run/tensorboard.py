"""The TensorBoard log of a run. Only rank 0 writes it; where tensorboard is not installed, there is none.

View it with `tensorboard --logdir runs`, which listens on loopback by default.
"""

from pathlib import Path
from typing import Any

from torch import Tensor


class TensorBoardLog:
    """Writes RUN/tensorboard. `step` is the step that the run continues from: later entries are dropped."""

    def __init__(self, run: Path, step: int, enabled: bool):
        self.writer: Any = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                return
            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def step(self, step: int, lr: float, counters: Tensor) -> None:
        """Rank 0's part of the epoch so far; `counters` are `Counters.values`. Synchronizes with the device."""
        if self.writer is None:
            return
        loss, top1, _, count = counters.tolist()
        self.writer.add_scalar("step/lr", lr, step)
        self.writer.add_scalar("step/loss_of_epoch_so_far", loss / count, step)
        self.writer.add_scalar("step/top1_of_epoch_so_far", 100 * top1 / count, step)

    def epoch(self, metrics: dict[str, Any]) -> None:
        if self.writer is None:
            return
        for key, value in metrics.items():
            self.writer.add_scalar(f"epoch/{key}", value, metrics["step"])
        self.writer.flush()

    def oscillations(self, layers: dict[str, dict[str, int]], step: int) -> None:
        """Fractions of each layer's weights that oscillate and that are frozen, from `Oscillations.count`."""
        if self.writer is None:
            return
        for name, count in layers.items():
            for key in ("oscillating", "frozen"):
                self.writer.add_scalar(f"{key}_share/{name}", count[key] / count["weights"], step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
