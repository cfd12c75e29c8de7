"""TrainState: everything that a run is at one moment, and so everything that a checkpoint holds.

The training loop runs from any state: a fresh one, a resumed one, later one that was rolled back. Nothing else
carries over from step to step: sample order, augmentation and random numbers follow from (seed, epoch, step, rank),
the learning rate from the step.
"""

from dataclasses import dataclass

from torch import nn

from nulsq.config import Recipe
from nulsq.ema import WeightAverage
from nulsq.errors import InputError
from nulsq.metrics import Counters
from nulsq.models import network
from nulsq.optim import Optimizers
from nulsq.quant.oscillation import Oscillations
from nulsq.weights import evaluated


@dataclass
class TrainState:
    model: nn.Module  # what oscillation trackers count is in its state dict
    optimizers: Optimizers
    counters: Counters  # of the epoch under way, on this rank
    average: WeightAverage | None = None  # of the model, where the recipe evaluates one
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done and evaluated
    best: dict | None = None  # metrics of the best epoch on the holdout
    outcome: str = "running"  # running, finished, saved, diverged

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(),
                "ema": self.average.values if self.average else None,
                "counters": self.counters.values, "step": self.step, "epoch": self.epoch, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint's content. Raises InputError where it is of another network."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizers"])
            if self.average:
                self.average.load_(state["ema"])
            self.counters.values.copy_(state["counters"])
            self.step, self.epoch, self.best = state["step"], state["epoch"], state["best"]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint is not of this recipe: {' '.join(str(error).split())[:200]}") from None


def track_oscillations(recipe: Recipe, model: nn.Module) -> Oscillations | None:
    """The trackers that the recipe asks for, made in the model. Raises InputError where it has nothing to track."""
    try:
        return Oscillations(model, recipe.oscillation) if recipe.oscillation.on else None
    except ValueError as error:
        raise InputError(str(error)) from None


def trained_network(recipe: Recipe, content: dict, classes: int) -> nn.Module:
    """The network of a run's checkpoint as evaluation sees it: averaged weights where the run kept them.

    Raises InputError where the checkpoint is not of this recipe or of another number of classes.
    """
    model = network(recipe, classes, start=False)
    track_oscillations(recipe, model)
    try:
        model.load_state_dict(evaluated(content))
    except (RuntimeError, KeyError) as error:
        raise InputError(f"the checkpoint is not of this network: {' '.join(str(error).split())[:200]}") from None
    return model
