"""What a run prints: a bar on a terminal, plain lines otherwise. Rank 0 only."""

import sys
import time
from pathlib import Path
from typing import Any

from nulsq.config import Recipe
from nulsq.distributed import Ranks
from nulsq.quant.projection import quantizers_of
from nulsq.quant.summary import summary
from nulsq.text import duration
from nulsq.training.state import TrainState

INTERVAL = 30.0  # seconds between two plain lines within an epoch


class Progress:
    """The steps of one epoch, and the line that sums the epoch up."""

    def __init__(self, epochs: int, ranks: Ranks, quiet: bool = False):
        self.epochs, self.ranks, self.quiet = epochs, ranks, quiet
        self.show = ranks.is_first and not quiet
        self.bar: Any = None

    def announce(self, recipe: Recipe, state: TrainState, data: str, loader: str, steps: int, run: Path) -> None:
        """Print what will be trained, on which data, and from which step."""
        ranks = self.ranks
        if quantizers_of(state.model):
            self.say(summary(state.model))
        holdout = "nothing held out" if recipe.data.holdout == "none" else f"holdout {recipe.data.holdout}"
        seen = ", which the starting weights have seen" if recipe.model.init_saw_holdout else ""
        self.say(f"{run}: {recipe.model.name} on {data} ({loader} loader, {steps} steps of {recipe.data.batch} per "
                 f"epoch, {holdout}{seen}), {ranks.size} {'rank' if ranks.size == 1 else 'ranks'} on "
                 f"{ranks.device.type}")
        if recipe.distill.teacher:
            self.say(f"taught by {recipe.distill.teacher}, weight {recipe.distill.weight:g} of the loss")
        if ranks.size > 1 and ranks.device.type == "cpu":
            self.say("batch norm is per rank on the CPU (torch has no SyncBatchNorm for it); its running statistics "
                     "are averaged over the ranks before each evaluation")
        if state.epoch >= self.epochs:
            self.say("this run is finished already")
        elif state.step:
            self.say(f"continuing at step {state.step} of {steps * self.epochs}")

    def start(self, epoch: int, done: int, steps: int) -> None:
        if not self.show:
            return
        self.epoch, self.steps, self.done = epoch, steps, done
        self.last = time.monotonic()
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self.bar = tqdm(total=steps, initial=done, desc=f"epoch {epoch + 1}/{self.epochs}", leave=False,
                            unit="step")

    def advance(self) -> None:
        if not self.show:
            return
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif time.monotonic() - self.last >= INTERVAL:
            self.last = time.monotonic()
            print(f"epoch {self.epoch + 1}/{self.epochs}  step {self.done}/{self.steps}", flush=True)

    def finish(self, metrics: dict[str, Any], epochs_left: int) -> None:
        """Print the line of a finished epoch."""
        if not self.show:
            return
        self.close()
        val = f"  val top-1 {metrics['val_top1']:.2f}" if "val_top1" in metrics else ""
        if "raw_val_top1" in metrics:
            val += f" ({metrics['raw_val_top1']:.2f} not averaged)"
        if "oscillating_share" in metrics:
            val += (f"  oscillating {100 * metrics['oscillating_share']:.2f}%, "
                    f"frozen {100 * metrics['frozen_share']:.2f}%")
        print(f"epoch {metrics['epoch']}/{self.epochs}  loss {metrics['train_loss']:.4f}  "
              f"top-1 {metrics['train_top1']:.2f}{val}  {metrics['images_per_second']:.0f} img/s  "
              f"waiting for data {100 * metrics['wait_share']:.1f}%  left {duration(epochs_left * metrics['seconds'])}",
              flush=True)

    def say(self, text: str) -> None:
        if self.show and text:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
