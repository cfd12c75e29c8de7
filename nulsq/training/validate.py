"""What is measured on the holdout after each epoch; never on test."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nulsq.config import Recipe
from nulsq.data import Loaders, Normalize
from nulsq.distributed import Ranks
from nulsq.evaluate import evaluate
from nulsq.quant.batch_norm import reestimate_batch_norm_
from nulsq.quant.calibration.calibrate import average_batch_norm_
from nulsq.training.state import TrainState
from nulsq.training.stop import Asked, Stopped


def validate(recipe: Recipe, ranks: Ranks, state: TrainState, loaders: Loaders, normalize: Normalize,
             asked: Asked) -> dict:
    """Settle batch-norm statistics, which the checkpoint then holds, and measure accuracy. A collective call.

    "val_..." is what checkpoints are chosen by: of the averaged weights where the recipe averages them, beside the
    trained ones' own, "raw_val_...". Where nothing is held out only the statistics are settled. Raises Stopped on
    every rank where `asked` says so; the state is then as it was.
    """
    before = state.own()
    try:
        return _settle_and_measure(recipe, ranks, state, loaders, normalize, asked)
    except Stopped:
        state.load_own(before)
        raise


def _settle_and_measure(recipe, ranks, state, loaders, normalize, asked):
    def measure(prefix):
        if recipe.optim.reestimate_bn:
            batches = first_batches(loaders.train, normalize, recipe.optim.reestimate_bn)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
                reestimate_batch_norm_(state.model, batches)
        elif ranks.device.type == "cpu":
            average_batch_norm_(state.model.modules())  # torch has no SyncBatchNorm for the CPU
        if loaders.val is None:
            return {}
        return evaluate(state.model, loaders.val, normalize, ranks, recipe, prefix, asked)

    if state.average is None:
        return measure("val")
    raw = measure("raw_val")
    with state.average.applied():
        return raw | measure("val")


def first_batches(loader, normalize: Normalize, count: int) -> Iterator[Tensor]:
    """`count` batches (at most an epoch) of a training loader's epoch 0, whatever the epoch under way.

    The same images every time: what differs between two measurements on them is the network, and a run's statistics
    follow from its checkpoint and recipe alone.
    """
    return (normalize(images) for _, (images, _, _) in zip(range(count), loader.epoch(0), strict=False))
