"""in_evaluation(model): evaluation mode for a block of code; then each module is in its previous mode again."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block. Afterwards each module has its previous mode; they may differ."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
