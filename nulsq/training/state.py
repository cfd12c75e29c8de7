"""TrainState: everything that a run is at one moment, and so everything that a checkpoint holds.

The training loop continues from any state: a fresh one, a resumed one, one that was rolled back. Nothing else carries
over from step to step: sample order, augmentation and random numbers follow from (seed, epoch, step, rank), and the
learning rate from the step.

Most of a state is the same on every rank. Counters and (on the CPU) running batch-norm statistics are not: they are
saved for each rank, so that the same number of ranks continues exactly where they were.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.quant.batch_norm import batch_norms
from nulsq.run.status import RunStatus
from nulsq.training.divergence import DivergenceGuard
from nulsq.training.ema import WeightAverage
from nulsq.training.metrics import Counters
from nulsq.training.optim import Optimizers


@dataclass
class TrainState:
    """The state of a run. `state_dict` is the content of a checkpoint, the same keys as in the files."""

    model: nn.Module  # with its oscillation trackers
    optimizers: Optimizers
    counters: Counters  # of the current epoch, on this rank
    guard: DivergenceGuard
    average: WeightAverage | None = None  # of the model's weights, where the recipe evaluates an average
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done and evaluated
    best: dict[str, Any] | None = None  # metrics of the best epoch on the holdout
    skipped: list[int] = field(default_factory=list)  # steps whose batch the divergence guard left out
    status: RunStatus = RunStatus.RUNNING

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """The content of a checkpoint. A collective call; every rank gets all of it."""
        return {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(),
                "ema": self.average.values if self.average else None, "step": self.step, "epoch": self.epoch,
                "best": self.best, "skipped": self.skipped, "level": self.guard.state_dict(),
                "ranks": ranks.gather(self.rank_state_dict())}

    def rank_state_dict(self) -> dict[str, Any]:
        """Copies of the part of the state that this rank alone has."""
        norms = {name: value.clone() for name, value in _running_statistics(self.model).items()}
        averages = {name: self.average.values[name].clone() for name in norms} if self.average else {}
        return {"counters": self.counters.values.clone(), "batch_norm": norms, "ema": averages}

    def load_rank_state_dict(self, content: dict[str, Any]) -> None:
        for name, value in _running_statistics(self.model).items():
            value.copy_(content["batch_norm"][name])
            if self.average:
                self.average.values[name].copy_(content["ema"][name])
        self.counters.values.copy_(content["counters"])

    def load_state_dict(self, content: dict[str, Any], ranks: Ranks) -> str:
        """Continue from a checkpoint's content. Returns a note on what differs from the saved run, "" for nothing.

        Raises InputError for a checkpoint of another network.
        """
        try:
            self.model.load_state_dict(content["model"])
            self.optimizers.load_state_dict(content["optimizers"])
            if self.average:
                self.average.load_(content["ema"])
            self.guard.load_state_dict(content["level"])
            self.step, self.epoch, self.best = content["step"], content["epoch"], content["best"]
            self.skipped = list(content["skipped"])
            per_rank = content["ranks"]
            if len(per_rank) == ranks.size:
                self.load_rank_state_dict(per_rank[ranks.rank])
                return ""
            self.load_rank_state_dict(_merge_ranks(per_rank))
            if not ranks.is_first:
                self.counters.reset()  # rank 0 has the sum
            return (f"saved by {len(per_rank)} ranks, continued by {ranks.size}: every step uses the same images, but "
                    "batch norm sees them in other parts, its running statistics start from the ranks' average, and "
                    "sums are rounded differently; the result is as good, but not bit for bit the same")
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint is not of this recipe: {' '.join(str(error).split())[:200]}") from None


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running batch-norm statistics by their keys in the model's state dict."""
    norms = set(batch_norms(model))
    return {f"{name}.{key}" if name else key: getattr(module, key) for name, module in model.named_modules()
            if module in norms for key in ("running_mean", "running_var")}


def _merge_ranks(per_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """One rank's state from those of several: sums of counters, means of statistics."""
    def mean(part: str) -> dict[str, Tensor]:
        return {name: torch.stack([rank[part][name] for rank in per_rank]).mean(0) for name in per_rank[0][part]}

    return {"counters": sum(rank["counters"] for rank in per_rank), "batch_norm": mean("batch_norm"),
            "ema": mean("ema")}
