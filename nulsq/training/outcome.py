"""How a run saves itself, and how it ends: outcome.json and the state's outcome. Collective calls."""

import math

from nulsq.distributed import Ranks
from nulsq.run import checkpoint
from nulsq.run.directory import RunDirectory
from nulsq.run.status import RunStatus, write_status
from nulsq.training.progress import Progress
from nulsq.training.state import TrainState

EXIT_DIVERGED, EXIT_SAVED = 3, 99  # of `python -m nulsq.train`; torchrun makes 1 of both, outcome.json tells them apart


def save(state: TrainState, ranks: Ranks, run: RunDirectory) -> None:
    """Write a checkpoint. Raises InputError on every rank where it cannot be written."""
    content = state.state_dict(ranks)
    ranks.on_first(lambda: checkpoint.save(run.path, content) and None)


def finished(state: TrainState, ranks: Ranks, run: RunDirectory) -> TrainState:
    state.outcome = "finished"
    ranks.on_first(lambda: write_status(run.path, RunStatus.FINISHED, epoch=state.epoch, best=state.best,
                                      skipped=state.skipped))
    return state


def saved(state: TrainState, ranks: Ranks, run: RunDirectory, progress: Progress) -> TrainState:
    """The run was asked to stop and is in its newest checkpoint: to be started again."""
    state.outcome = "saved"
    ranks.on_first(lambda: write_status(run.path, RunStatus.SAVED, epoch=state.epoch, step=state.step))
    progress.say(f"saved at step {state.step} of epoch {state.epoch + 1}; the same command continues")
    return state


def diverged(state: TrainState, ranks: Ranks, run: RunDirectory, progress: Progress, step: int,
             where: str) -> tuple[TrainState, dict]:
    """The guard gave up at `step`; `where` says on each rank whose values went bad. Also the epoch's last metrics."""
    state.outcome = "diverged"
    found = ranks.gather(where)
    text = next((each for each in found if not each.startswith("no layer")), found[0])
    ranks.on_first(lambda: write_status(run.path, RunStatus.DIVERGED, epoch=state.epoch, step=step,
                                      skipped=state.skipped, error=f"step {step}: {text}"))
    progress.say(f"diverged at step {step} of epoch {state.epoch + 1}: {text}. What was saved before it is in "
                 f"{run.path / 'checkpoints'}")
    return state, {"epoch": state.epoch + 1, "step": step,
                   **dict.fromkeys(("train_loss", "val_loss", "val_top1", "val_top5"), math.nan)}
