"""Training: one function for plain python, torchrun, Slurm and a Ray trial.

    python -m nulsq.train configs/recipes/digits/w2a2.yaml optim.epochs=5
    torchrun --nproc-per-node 2 -m nulsq.train configs/recipes/cifar10/w2a2.yaml

    from nulsq.train import train
    state = train(recipe, report=lambda metrics, checkpoint_dir: ..., stop=lambda: False)

Exit codes: 0 finished, 1 failed, 2 bad input, 3 diverged, 99 saved before the end (start the same command again).
Training sees the training images and a holdout of them, never the test images: `nulsq.evaluate` opens those.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nulsq.config import Recipe, command_line
from nulsq.distributed import Ranks, join_ranks
from nulsq.errors import exit_on_input_error
from nulsq.quant.batch_norm import freeze_batch_norm_
from nulsq.quant.oscillation import oscillating_fraction
from nulsq.quant.summary import summary
from nulsq.run import checkpoint
from nulsq.run.directory import METRICS, OSCILLATIONS, RunDirectory, path_of, read_metrics
from nulsq.run.status import RunStatus, read_status, write_status
from nulsq.training.divergence import Diverged, find_nonfinite
from nulsq.training.prepare import prepare
from nulsq.training.progress import Progress
from nulsq.training.setup import Training, isolate_process, set_up
from nulsq.training.state import TrainState
from nulsq.training.stop import SAVE_FILE, Action, Stopped, stop_on_signal
from nulsq.training.validate import validate

Report = Callable[[dict[str, Any], Path], None]


def train(recipe: Recipe, *, report: Report | None = None, resume: Path | None = None,
          stop: Callable[[], bool] | None = None, quiet: bool = False) -> TrainState:
    """Train a recipe to its end, or until `stop()`. Continues the run directory's newest checkpoint.

    Args:
        report: called once per epoch on every rank with the epoch's metrics and the folder of the checkpoints; for a
            run that diverged, called once more with losses and accuracies NaN.
        resume: a checkpoint file to continue from; None takes the newest good one of the run directory, if any.
        stop: polled at step boundaries and in evaluation. True on any rank saves the state and returns.
        quiet: print nothing.

    Returns the state at the end; its `status` is finished, saved or diverged, as in outcome.json. Can be called many
    times in one process: it leaves no thread, process group or changed global setting behind.

    Raises InputError for a recipe that cannot be run, before anything is written; later for a checkpoint that cannot be
    written or damaged data, with the earlier checkpoints intact.
    """
    with join_ranks(recipe.run.device) as ranks, contextlib.ExitStack() as cleanup:
        isolate_process(recipe, ranks, cleanup)

        # ---- check all input, before the run directory exists
        run = RunDirectory(path_of(recipe))
        resume = resume or ranks.on_first(lambda: checkpoint.newest(run.path))
        resumed = checkpoint.load(Path(resume)) if resume is not None else None
        prepared = prepare(recipe, ranks, start=resumed is None)

        # ---- train; outcome.json says how it ended
        cleanup.callback(run.release)
        ranks.on_first(lambda: run.start(recipe))
        progress = Progress(recipe.optim.epochs, ranks, quiet=quiet)
        cleanup.callback(progress.close)
        try:
            training = set_up(recipe, prepared, resumed, ranks=ranks, run=run, stop=stop, progress=progress,
                              cleanup=cleanup)
            return train_epochs(training, report or (lambda metrics, folder: None))
        except SystemExit:  # raised by `report`: the caller ends the run after an epoch, which is saved
            if ranks.is_first and read_status(run.path) is RunStatus.RUNNING:
                write_status(run.path, RunStatus.SAVED, requeue=False)
            raise
        except (Exception, KeyboardInterrupt) as error:
            with contextlib.suppress(OSError):  # a full disk raises again; any rank may be the one that fails
                write_status(run.path, RunStatus.FAILED, error=f"{type(error).__name__}: {error}"[:2000])
            raise


def train_epochs(training: Training, report: Report) -> TrainState:
    """The training loop: epochs, from wherever the state is, to the end of the recipe."""
    state, recipe, folder = training.state, training.recipe, training.run.path / checkpoint.FOLDER
    while state.epoch < recipe.optim.epochs:
        start = time.monotonic()
        try:
            metrics = train_epoch(training)
            metrics |= validate(recipe, training.ranks, state, training.loaders, training.normalize,
                                training.stop_request)
            if not math.isfinite(metrics.get("val_loss", 0.0)):
                raise Diverged(state.step - 1)  # its loss, computed before the update, was finite
        except Diverged as divergence:
            if len(state.skipped) >= recipe.guard.rollbacks:
                report(end_diverged(training, divergence), folder)
                return state
            roll_back(training, divergence)
            continue
        except Stopped:
            training.save()
            training.progress.say(f"saved at step {state.step} of epoch {state.epoch + 1}; the same command continues")
            return training.end(RunStatus.SAVED, step=state.step)
        finish_epoch(training, metrics, start)
        report(metrics, folder)
    return training.end(RunStatus.FINISHED, best=state.best, skipped=state.skipped)


def train_epoch(training: Training) -> dict[str, Any]:
    """The rest of the current epoch, step by step. Returns its metrics on the training images.

    Raises Diverged where a step went wrong, Stopped where the run was asked to stop.
    """
    state, optim, guard, seed = training.state, training.recipe.optim, training.state.guard, training.recipe.run.seed
    start, first_step, waited = time.monotonic(), state.step, 0.0
    offset = state.step - state.epoch * training.steps
    training.progress.start(state.epoch, offset, training.steps)
    state.model.train()
    if optim.freeze_bn:
        freeze_batch_norm_(state.model)
    for images, labels, seconds in _timed(training.loaders.train.epoch(state.epoch, offset)):
        waited += seconds
        training.last_images = images
        lr = training.learning_rate(state.step)
        if state.step not in state.skipped:
            torch.manual_seed(_step_seed(seed, state.step, training.ranks.rank))
            labels = labels.to(training.ranks.device, non_blocking=True)
            loss, norm = training.step.gradients(training.normalize(images), labels, state.step / training.total_steps)
            guard.observe(state.step, loss, norm)
            training.step.update(lr, (state.step + 1) / training.total_steps)
            if state.average:
                state.average.update_(state.step + 1)
        state.step += 1
        training.progress.advance()
        if state.step % training.recipe.run.log_every == 0:
            training.log.step(state.step, lr, state.counters.values)
        save_if_due(training)
    guard.check()
    seconds = time.monotonic() - start
    return {"epoch": state.epoch + 1, "step": state.step, "lr": training.learning_rate(state.step - 1),
            **state.counters.read(training.ranks, "train"),
            "images_per_second": (state.step - first_step) * training.recipe.data.batch / seconds,
            "wait_share": waited / seconds}


def save_if_due(training: Training) -> None:
    """After a step: save where run.save_every, the file RUN/save or a stop asks for it. Raises Stopped for a stop."""
    state, every = training.state, training.recipe.run.save_every
    action = training.stop_request.poll(state.step)
    if action is Action.NONE and not (every and state.step % every == 0):
        return
    state.guard.check()  # no checkpoint holds a network that has gone bad
    if action is Action.STOP:
        raise Stopped
    training.save()
    if action is Action.SAVE:
        training.progress.say(f"saved at step {state.step}, as the file {SAVE_FILE} asks for")
        training.ranks.on_first(training.stop_request.remove_save_file)


def finish_epoch(training: Training, metrics: dict[str, Any], start: float) -> None:
    """Record an epoch that began at time `start`: metrics, best epoch, oscillations, checkpoint."""
    state, run = training.state, training.run
    layers = training.oscillations.count() if training.oscillations else {}
    if layers:
        metrics |= oscillating_fraction(layers)
    metrics["seconds"] = time.monotonic() - start
    if "val_top1" in metrics and (state.best is None or metrics["val_top1"] > state.best["val_top1"]):
        state.best = dict(metrics)
    state.epoch += 1
    state.counters.reset()
    if training.ranks.is_first:
        run.append(METRICS, metrics)
        training.log.epoch(metrics)
        if layers:
            run.append(OSCILLATIONS, {"epoch": state.epoch, "step": state.step, "layers": layers})
            training.log.oscillations(layers, state.step)
    training.save()
    training.progress.finish(metrics, training.recipe.optim.epochs - state.epoch)


def roll_back(training: Training, divergence: Diverged) -> None:
    """Go back to the newest checkpoint; from now on leave out the batch of the step that went wrong."""
    state, guard = training.state, training.recipe.guard
    skipped = [*state.skipped, divergence.step]
    newest = training.ranks.on_first(lambda: checkpoint.newest(training.run.path))
    assert newest is not None  # set_up saved one
    state.load_state_dict(checkpoint.load(newest), training.ranks)
    training.step.state_was_loaded()
    state.skipped = skipped
    state.guard.rolled_back(watch_until=divergence.step + guard.every)
    training.progress.say(f"step {divergence.step} went wrong; going back to step {state.step} and leaving its batch "
                          f"out ({len(skipped)} of at most {guard.rollbacks})")


def end_diverged(training: Training, divergence: Diverged) -> dict[str, Any]:
    """End the run as diverged and name the layer that went wrong first. Returns metrics with NaN for `report`."""
    state, step, images = training.state, divergence.step, training.last_images
    causes = training.ranks.gather(find_nonfinite(state.model, None if images is None else training.normalize(images)))
    cause = next((text for text in causes if not text.startswith("no layer")), causes[0])
    training.end(RunStatus.DIVERGED, step=step, skipped=state.skipped, error=f"step {step}: {cause}")
    training.progress.say(f"diverged at step {step} of epoch {state.epoch + 1}: {cause}. Earlier checkpoints are in "
                          f"{training.run.path / checkpoint.FOLDER}")
    return {"epoch": state.epoch + 1, "step": step,
            **dict.fromkeys(("train_loss", "val_loss", "val_top1", "val_top5"), math.nan)}


def _timed(batches: Iterator[tuple[Tensor, Tensor, Any]]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Images and labels of each batch, and the seconds that the loader took for it."""
    start = time.monotonic()
    for images, labels, _ in batches:
        yield images, labels, time.monotonic() - start
        start = time.monotonic()


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers inside the network (dropout) follow from (seed, step, rank): there is no state to save."""
    return (seed * 1_000_003 + step) * 4099 + rank


# ---- command line


@exit_on_input_error
def main(argv: list[str]) -> int:
    parser = command_line.parser("python -m nulsq.train", "Train one recipe. Prints accuracy on the holdout; "
                                 "`python -m nulsq.evaluate RUN` measures it on the test images.")
    parser.add_argument("--dry-run", type=int, nargs="?", const=1, metavar="RANKS",
                        help="check everything for this many ranks (1), print the plan, write nothing")
    arguments, recipe = command_line.parse(parser, argv)
    with join_ranks(recipe.run.device) as ranks:
        if arguments.dry_run is not None:
            prepared = prepare(recipe, Ranks(0, arguments.dry_run, ranks.device))
            if ranks.is_first:
                print(summary(prepared.model))
                print(f"would train {recipe.optim.epochs} epochs on {prepared.data.name} ({prepared.loader_name} "
                      f"loader) in {path_of(recipe)}")
            return 0
        with stop_on_signal() as stop:
            state = train(recipe, stop=stop)
        if ranks.is_first and state.status is RunStatus.FINISHED:
            print(result_line(path_of(recipe)), flush=True)
    return state.status.exit_code


def result_line(run: Path) -> str:
    """What a finished run reached, and the command that evaluates it on the test images."""
    best, last = checkpoint.load_chosen(run)["best"], read_metrics(run)[-1]
    reached = (f"holdout top-1 {best['val_top1']:.2f} at epoch {best['epoch']}" if best else
               f"training loss {last['train_loss']:.4f}, nothing was held out")
    return f"{reached}; on the test images: python -m nulsq.evaluate {run}"


if __name__ == "__main__":
    raise SystemExit(main())
