"""TrainState: everything that a run is at one moment, and so everything that a checkpoint holds.

The training loop runs from any state: a fresh one, a resumed one, later one that was rolled back. Nothing else
carries over from step to step: sample order, augmentation and random numbers follow from (seed, epoch, step, rank),
the learning rate from the step.
"""

from dataclasses import dataclass

from torch import nn

from nulsq.errors import InputError
from nulsq.metrics import Counters
from nulsq.optim import Optimizers


@dataclass
class TrainState:
    model: nn.Module
    optimizers: Optimizers
    counters: Counters  # of the epoch under way, on this rank
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done and evaluated
    best: dict | None = None  # metrics of the best epoch on the holdout
    outcome: str = "running"  # running, finished, saved, diverged

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(),
                "counters": self.counters.values, "step": self.step, "epoch": self.epoch, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint's content. Raises InputError where it is of another network."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizers"])
            self.counters.values.copy_(state["counters"])
            self.step, self.epoch, self.best = state["step"], state["epoch"], state["best"]
        except (RuntimeError, KeyError, ValueError) as error:
            raise InputError(f"the checkpoint is not of this recipe: {' '.join(str(error).split())[:200]}") from None
