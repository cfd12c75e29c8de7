"""TrainState: everything that a run is at one moment, and so everything that a checkpoint holds.

The training loop runs from any state: a fresh one, a resumed one, one that was rolled back. Nothing else carries over
from step to step: sample order, augmentation and random numbers follow from (seed, epoch, step, rank), the learning
rate from the step.

Most of a state is the same on every rank. What is not, counters and (on the CPU) running batch-norm statistics, is
saved for each rank, so that as many ranks continue exactly where they were.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from nulsq.config import Recipe
from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.models.network import build_network
from nulsq.models.weights import evaluated
from nulsq.quant.batch_norm import batch_norms
from nulsq.quant.oscillation import Oscillations
from nulsq.training.ema import WeightAverage
from nulsq.training.metrics import Counters
from nulsq.training.optim import Optimizers


@dataclass
class TrainState:
    model: nn.Module  # what oscillation trackers count is in its state dict
    optimizers: Optimizers
    counters: Counters  # of the epoch under way, on this rank
    average: WeightAverage | None = None  # of the model, where the recipe evaluates one
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done and evaluated
    best: dict | None = None  # metrics of the best epoch on the holdout
    skipped: list[int] = field(default_factory=list)  # steps whose batch the divergence guard left out
    level: list[float] = field(default_factory=lambda: [0.0, 0])  # the guard's mean of good losses, and their number
    outcome: str = "running"  # running, finished, saved, diverged

    def state_dict(self, ranks: Ranks) -> dict:
        """The content of a checkpoint. A collective call; every rank gets all of it."""
        return {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(),
                "ema": self.average.values if self.average else None, "step": self.step, "epoch": self.epoch,
                "best": self.best, "skipped": self.skipped, "level": self.level, "ranks": ranks.gather(self.own())}

    def own(self) -> dict:
        """Copies of what this rank has alone."""
        norms = {name: value.clone() for name, value in _statistics(self.model).items()}
        averages = {name: self.average.values[name].clone() for name in norms} if self.average else {}
        return {"counters": self.counters.values.clone(), "batch_norm": norms, "ema": averages}

    def load_own(self, own: dict) -> None:
        for name, value in _statistics(self.model).items():
            value.copy_(own["batch_norm"][name])
            if self.average:
                self.average.values[name].copy_(own["ema"][name])
        self.counters.values.copy_(own["counters"])

    def load_state_dict(self, content: dict, ranks: Ranks) -> str:
        """Continue from a checkpoint's content; returns what is different now, in words, "" where nothing is.

        Raises InputError where it is of another network.
        """
        try:
            self.model.load_state_dict(content["model"])
            self.optimizers.load_state_dict(content["optimizers"])
            if self.average:
                self.average.load_(content["ema"])
            self.step, self.epoch, self.best = content["step"], content["epoch"], content["best"]
            self.skipped, self.level = list(content["skipped"]), list(content["level"])
            per_rank = content["ranks"]
            if len(per_rank) == ranks.size:
                self.load_own(per_rank[ranks.rank])
                return ""
            self.load_own(_merged(per_rank))
            if not ranks.is_first:
                self.counters.reset()  # rank 0 has the sum
            return (f"saved by {len(per_rank)} ranks, continued by {ranks.size}: every step takes the same images, but "
                    "batch norm sees other parts of them at a time, its running statistics start from the ranks' "
                    "average, and sums are rounded otherwise; the result is as good, not bit for bit the same")
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint is not of this recipe: {' '.join(str(error).split())[:200]}") from None


def _statistics(model):
    """Running batch-norm statistics by their keys in the model's state dict."""
    own = set(batch_norms(model))
    return {f"{name}.{key}" if name else key: getattr(module, key) for name, module in model.named_modules()
            if module in own for key in ("running_mean", "running_var")}


def _merged(per_rank):
    """One rank's part made of those of several: sums of counters, means of statistics."""
    def mean(part):
        return {name: torch.stack([rank[part][name] for rank in per_rank]).mean(0) for name in per_rank[0][part]}

    return {"counters": sum(rank["counters"] for rank in per_rank), "batch_norm": mean("batch_norm"),
            "ema": mean("ema")}


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
    model = build_network(recipe, classes, start=False)
    track_oscillations(recipe, model)
    try:
        model.load_state_dict(evaluated(content))
    except (RuntimeError, KeyError) as error:
        raise InputError(f"the checkpoint is not of this network: {' '.join(str(error).split())[:200]}") from None
    return model
