"""The TensorBoard log of a run. Rank 0 only; without tensorboard installed, none is written.

Look at it with `tensorboard --logdir runs`: it listens on loopback unless told otherwise.
"""

from pathlib import Path

from nulsq.training.metrics import Counters


class TensorBoardLog:
    def __init__(self, run: Path, step: int, enabled: bool):
        self.writer = None
        if enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                return
            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def step(self, step: int, rate: float, counters: Counters) -> None:
        """Rank 0's own part of the batches. Synchronizes: call it every so many steps."""
        if self.writer is None:
            return
        loss, top1, _, count = counters.values.tolist()
        self.writer.add_scalar("step/lr", rate, step)
        self.writer.add_scalar("step/loss_of_epoch_so_far", loss / count, step)
        self.writer.add_scalar("step/top1_of_epoch_so_far", 100 * top1 / count, step)

    def epoch(self, metrics: dict) -> None:
        if self.writer is None:
            return
        for key, value in metrics.items():
            self.writer.add_scalar(f"epoch/{key}", value, metrics["step"])
        self.writer.flush()

    def oscillations(self, layers: dict[str, dict[str, int]], step: int) -> None:
        """Per layer, as `Oscillations.count` has it: the share of weights that oscillate, and that are frozen."""
        if self.writer is None:
            return
        for name, count in layers.items():
            for what in ("oscillating", "frozen"):
                self.writer.add_scalar(f"{what}_share/{name}", count[what] / count["weights"], step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
