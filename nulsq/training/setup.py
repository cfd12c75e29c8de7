"""Puts the parts of a run together: network, loaders, state, step. Resumes where there is a checkpoint."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nulsq.config import Recipe
from nulsq.data import Loaders, Normalize, build_loaders
from nulsq.distributed import Ranks
from nulsq.errors import InputError
from nulsq.evaluate import evaluate
from nulsq.models.network import fold_for_training, track_oscillations
from nulsq.quant.calibration.calibrate import calibrate_
from nulsq.quant.oscillation import Oscillations
from nulsq.quant.projection import quantizers_of
from nulsq.run import checkpoint
from nulsq.run.directory import RunDirectory
from nulsq.run.status import RunStatus, write_status
from nulsq.run.tensorboard import TensorBoardLog
from nulsq.tensor_format import place
from nulsq.training.compile import compiled
from nulsq.training.divergence import DivergenceGuard
from nulsq.training.ema import WeightAverage
from nulsq.training.memory import keep_freed_memory
from nulsq.training.metrics import Counters
from nulsq.training.optim import Optimizers, learning_rate
from nulsq.training.prepare import Prepared
from nulsq.training.progress import Progress
from nulsq.training.state import TrainState
from nulsq.training.step import TrainingStep, training_step
from nulsq.training.stop import Stopped, StopRequest
from nulsq.training.validate import first_batches


@dataclass
class Training:
    """The parts of a run that is being trained."""

    recipe: Recipe
    ranks: Ranks
    run: RunDirectory
    loaders: Loaders
    normalize: Normalize
    state: TrainState
    step: TrainingStep
    learning_rate: Callable[[int], float]  # of the weights, by step
    oscillations: Oscillations | None
    stop_request: StopRequest
    progress: Progress
    log: TensorBoardLog
    last_images: Tensor | None = None  # the batch of the last step; after a divergence its layers are searched

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.loaders.train.steps

    @property
    def total_steps(self) -> int:
        return self.steps * self.recipe.optim.epochs

    def save(self) -> None:
        """Write a checkpoint. A collective call. Raises InputError on every rank where it cannot be written."""
        content = self.state.state_dict(self.ranks)
        self.ranks.on_first(lambda: checkpoint.save(self.run.path, content) and None)

    def end(self, status: RunStatus, **details: Any) -> TrainState:
        """Set the status of the state and of the run directory. A collective call."""
        self.state.status = status
        self.ranks.on_first(lambda: write_status(self.run.path, status, epoch=self.state.epoch, **details))
        return self.state


def isolate_process(recipe: Recipe, ranks: Ranks, cleanup: contextlib.ExitStack) -> None:
    """Apply the process-wide settings of a run; `cleanup` restores them."""
    cleanup.enter_context(torch.random.fork_rng(devices=[ranks.device] if ranks.device.type == "cuda" else []))
    if ranks.device.type == "cpu":
        keep_freed_memory()
    if recipe.run.threads:
        cleanup.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(recipe.run.threads)


def set_up(recipe: Recipe, prepared: Prepared, resumed: dict[str, Any] | None, *, ranks: Ranks, run: RunDirectory,
           stop: Callable[[], bool] | None, progress: Progress, cleanup: contextlib.ExitStack) -> Training:
    """Calibrate a fresh network or load `resumed`, a checkpoint's content. A collective call.

    Raises InputError where data cannot be calibrated on, or the checkpoint is of another recipe.
    """
    model, optim, device = prepared.model, recipe.optim, ranks.device

    # ---- network: the order matters. Device, calibration, folding, trackers, then the wrappers
    model = place(model, device, recipe.run.channels_last)
    loaders = build_loaders(recipe.data, prepared.data, recipe.run.seed, ranks.rank, ranks.size, device,
                            recipe.optim.epochs)
    normalize = Normalize(prepared.data, device, recipe.run.channels_last)
    stop_request = StopRequest(stop, ranks, run.path)
    if resumed is None and quantizers_of(model):
        _calibrate(recipe, ranks, model, loaders, normalize, progress, stop_request)
    model = fold_for_training(model, ranks.size, device)
    oscillations = track_oscillations(recipe, model)
    network = ranks.data_parallel(model)
    if recipe.run.compile:
        network = compiled(network, device)
        cleanup.callback(torch.compiler.reset)  # after eight networks of one class torch would no longer compile

    # ---- state: fresh or resumed
    average = WeightAverage(model, optim.ema_decay) if optim.ema_decay else None
    guard = DivergenceGuard(recipe.guard, len(prepared.data.classes), ranks)
    state = TrainState(model, Optimizers(model, optim), Counters(device), guard, average)
    step = training_step(recipe, ranks, state, network, prepared.teacher, oscillations)
    if resumed is not None:
        progress.say(state.load_state_dict(resumed, ranks))

    # ---- run directory and logs
    if ranks.is_first:
        run.truncate_records(state.epoch)  # records after the checkpoint are written again
    steps = loaders.train.steps
    total_steps = steps * optim.epochs
    schedule = functools.partial(learning_rate, steps=total_steps, warmup_steps=round(steps * optim.warmup_epochs),
                                 peak=optim.lr, warmup_lr=optim.warmup_lr, shape=optim.schedule)
    if state.epoch < optim.epochs:
        ranks.on_first(lambda: write_status(run.path, RunStatus.RUNNING))
    progress.announce(recipe, state, prepared.data.name, prepared.loader_name, steps, run.path)
    log = TensorBoardLog(run.path, state.step, enabled=ranks.is_first and state.step < total_steps)
    cleanup.callback(log.close)
    training = Training(recipe, ranks, run, loaders, normalize, state, step, schedule, oscillations, stop_request,
                        progress, log)
    if resumed is None:
        training.save()  # what a run that diverges in its first epoch goes back to
    return training


def _calibrate(recipe: Recipe, ranks: Ranks, model: torch.nn.Module, loaders: Loaders, normalize: Normalize,
               progress: Progress, stop_request: StopRequest) -> None:
    batches = first_batches(loaders.train, normalize, recipe.quant.calibration_batches)
    try:
        calibrate_(model, batches, recipe.quant.calibration)
    except ValueError as error:
        raise InputError(str(error)) from None
    if loaders.val is not None and not progress.quiet:  # a collective call: all ranks are as quiet as rank 0
        with contextlib.suppress(Stopped):  # training stops at its first step
            metrics = evaluate(model, loaders.val, normalize, ranks, precision=recipe.run.precision,
                               flip=recipe.data.eval_flip, stop_request=stop_request)
            progress.say(f"after calibration, before training: val top-1 {metrics['val_top1']:.2f}")
