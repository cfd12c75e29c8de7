"""What is measured on the holdout after each epoch. Never the test images."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from nulsq.config import Recipe
from nulsq.data import Loaders, Normalize
from nulsq.distributed import Ranks
from nulsq.evaluate import evaluate
from nulsq.quant.batch_norm import reestimate_batch_norm_
from nulsq.quant.calibration.calibrate import average_batch_norm_
from nulsq.tensor_format import autocast
from nulsq.training.state import TrainState
from nulsq.training.stop import Stopped, StopRequest


def validate(recipe: Recipe, ranks: Ranks, state: TrainState, loaders: Loaders, normalize: Normalize,
             stop_request: StopRequest) -> dict[str, Any]:
    """Set the batch-norm statistics, which the checkpoint then holds, and measure accuracy. A collective call.

    The metrics "val_..." choose the best checkpoint. Where the recipe averages weights, they are those of the averages,
    and "raw_val_..." those of the weights themselves. Where nothing is held out, only the statistics are set.
    Raises Stopped on every rank where the run was asked to stop; the state is then as it was.
    """
    def measure(prefix: str) -> dict[str, Any]:
        if recipe.optim.reestimate_bn:
            with autocast(ranks.device, recipe.run.precision):
                reestimate_batch_norm_(state.model, first_batches(loaders.train, normalize, recipe.optim.reestimate_bn))
        elif ranks.device.type == "cpu":
            average_batch_norm_(state.model.modules())  # torch has no SyncBatchNorm for the CPU
        if loaders.val is None:
            return {}
        return evaluate(state.model, loaders.val, normalize, ranks, prefix=prefix, precision=recipe.run.precision,
                        flip=recipe.data.eval_flip, stop_request=stop_request)

    before = state.rank_state_dict()
    try:
        if state.average is None:
            return measure("val")
        raw = measure("raw_val")
        with state.average.applied():
            return raw | measure("val")
    except Stopped:
        state.load_rank_state_dict(before)
        raise


def first_batches(loader: Any, normalize: Normalize, count: int) -> Iterator[Tensor]:
    """`count` batches (at most an epoch) of a training loader's epoch 0, whatever the current epoch is.

    The images are the same every time: two measurements on them differ by the network alone, and a run's statistics
    follow from its checkpoint and recipe.
    """
    return (normalize(images) for _, (images, _, _) in zip(range(count), loader.epoch(0), strict=False))
