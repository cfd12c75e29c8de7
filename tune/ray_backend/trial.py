"""A trial of one process: load its recipe, call `nulsq.train`, report each epoch's metrics to Tune.

It runs in a Ray worker. Its run directory is named by study and number and keeps metrics and checkpoints independently
of what Ray keeps, and a trial that starts again continues from it. `tune.ray_backend.workers` does the same with
several processes.

With `reuse`, a process that has ended a trial takes the next one: Python, torch and the loaders' compiled code are
loaded already, and `train` leaves no thread and no setting behind. A stopped trial waits inside `report` until then;
its memory and its run directory are free when the next one begins.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import ray.tune

from tune.ray_backend.trial_protocol import TrialSettings, as_result, completed_results, wait_until_free


def run(config: dict[str, Any]) -> None:
    """Train one trial in this process; `config`: see `TrialSettings.to_config`."""
    from nulsq.train import train  # imports torch; the search's own process imports this module without it

    _clear()
    settings = TrialSettings.from_config(config)
    os.chdir(settings.working_directory)
    recipe = settings.load_recipe()
    wait_until_free(settings)

    def report(metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        ray.tune.report(as_result(metrics, settings.metric))

    for result in completed_results(settings):
        ray.tune.report(result)
    train(recipe, report=report, quiet=True)


def _clear() -> None:
    """Release what the trial before may have left: memory, and the shapes that make torch.compile give up compiling.
    Compiled kernels stay on disk."""
    import torch

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class ReuseGuard:
    """Mixin of the Trainable class that Tune makes of `run`."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Raises RuntimeError where the trial before does not end. Tune itself would return False, and then end the new
        trial without a reason in its error file."""
        if not super().reset_config(new_config):  # type: ignore[misc]
            raise RuntimeError("the process that was to take this trial over is still ending the one before, after "
                               f"{os.environ.get('TUNE_FUNCTION_THREAD_TIMEOUT_S')} s")
        return True


# Private API of Ray Tune, used here only: classes that the Trainable of a function inherits from. The public
# alternative is a class Trainable with its own `reset_config`: it has no `ray.tune.report`, which hands over results
# from within `train`, so `train` would have to run in a thread and be stopped by code of ours.
run.__mixins__ = (ReuseGuard,)  # type: ignore[attr-defined]
