"""Networks of finished and running runs, as evaluation uses them: `load_run(path)`."""

from pathlib import Path

from torch import nn

from nulsq.config import Recipe
from nulsq.data import DataSet
from nulsq.errors import InputError
from nulsq.models.network import build_network, track_oscillations
from nulsq.models.weights import evaluated_state_dict
from nulsq.run import checkpoint
from nulsq.run.directory import read_recipe


def load_run(path: str | Path, *, checkpoint_name: str = "best", classes: int | None = None) -> nn.Module:
    """The network of a run directory: quantized and calibrated, with the weights that evaluation uses.

        model = nulsq.load_run("runs/digits-w2a2-0")
        logits = model(images)                          # normalized images [B, 3, H, W], on the CPU

    Where the run averages its weights (optim.ema_decay), these are the averages. Needs the `train` extra.

    Args:
        checkpoint_name: "best" on the holdout (the last one, where nothing is held out) or "last".
        classes: outputs of the network; None reads the number from the recipe's data set.

    Returns the network in evaluation mode. Raises InputError for a folder that is no run directory, a run without a
    good checkpoint, and, with `classes` = None, a data set that is not there.
    """
    recipe = read_recipe(Path(path))
    content = checkpoint.load_chosen(Path(path), checkpoint_name)
    return trained_network(recipe, content, classes or len(DataSet(recipe.data.path).classes)).eval()


def trained_network(recipe: Recipe, content: dict, classes: int) -> nn.Module:
    """The network of a checkpoint's content as evaluation uses it: averaged weights where the run kept them.

    Raises InputError where the checkpoint is not of this recipe or has another number of classes.
    """
    model = build_network(recipe, classes, start=False)
    track_oscillations(recipe, model)
    try:
        model.load_state_dict(evaluated_state_dict(content))
    except (RuntimeError, KeyError) as error:
        raise InputError(f"the checkpoint is not of this network: {' '.join(str(error).split())[:200]}") from None
    return model
