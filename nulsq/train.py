"""Training: one function for plain python, torchrun, Slurm and a Ray trial.

    python -m nulsq.train configs/recipes/digits/w2a2.yaml optim.epochs=5
    torchrun --nproc-per-node 2 -m nulsq.train configs/recipes/cifar10/w2a2.yaml

    from nulsq.train import train
    state = train(recipe, report=lambda metrics, checkpoint_dir: ..., stop=lambda: False)

Exit codes: 0 finished, 2 input that cannot be used, 3 diverged, 99 saved before the end (start the same command again).
Read top to bottom.
"""

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from nulsq import checkpoint, command_line
from nulsq.compile import compiled
from nulsq.config import Recipe
from nulsq.data import Normalize, build_loaders
from nulsq.distill import build_teacher
from nulsq.ema import WeightAverage
from nulsq.errors import InputError, exit_on_input_error
from nulsq.evaluate import evaluate, evaluate_run, read_evaluation
from nulsq.loss import backward
from nulsq.memory import keep_freed_memory
from nulsq.metrics import Counters
from nulsq.models import sync_batch_norm
from nulsq.optim import Optimizers, learning_rate
from nulsq.prepare import prepare
from nulsq.progress import Progress
from nulsq.quant.batch_norm import freeze_batch_norm_
from nulsq.quant.calibrate import average_batch_norm_, calibrate_
from nulsq.quant.fold_relu import fold_relu_
from nulsq.quant.oscillation import shares
from nulsq.quant.step import quantizers_of
from nulsq.quant.swap import summary
from nulsq.run_directory import METRICS, OSCILLATIONS, RunDirectory, path_of
from nulsq.signals import asked_to_stop, stop_on_signal
from nulsq.state import TrainState, track_oscillations
from nulsq.tensorboard import TensorBoardLog
from nulsq.validate import first_batches, validate
from nulsq.world import World, world

Report = Callable[[dict, Path], None]
EXIT_DIVERGED, EXIT_SAVED = 3, 99


def train(recipe: Recipe, *, report: Report | None = None, resume: Path | None = None,
          stop: Callable[[], bool] | None = None, quiet: bool = False) -> TrainState:
    """Train as the recipe says, from where its run directory stands, to the end or until `stop()`.

    Args:
        report: called once per epoch on every rank with the epoch's metrics and the checkpoints' folder.
        resume: a checkpoint file to continue from; None continues the run directory's own, if there is one.
        stop: polled at step boundaries; any rank's True saves the state and returns (outcome "saved").
        quiet: print nothing.

    Returns the state at the end; `state.outcome` is finished, saved or diverged, as in outcome.json. May be called
    many times in one process: it leaves no thread, process group or global setting of torch behind.

    Raises InputError, before anything is written, for a recipe that cannot be run.
    """
    threads = torch.get_num_threads()
    with world(recipe.run.device) as here, contextlib.ExitStack() as cleanup:
        cleanup.enter_context(torch.random.fork_rng(devices=[here.device] if here.device.type == "cuda" else []))
        if here.device.type == "cpu":
            keep_freed_memory()
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
            cleanup.callback(torch.set_num_threads, threads)

        # ---- everything that can be wrong with the input is found here, before the run directory exists
        run = RunDirectory(path_of(recipe))
        resume = resume or here.on_first(lambda: checkpoint.newest(run.path))
        resumed = checkpoint.load(Path(resume)) if resume is not None else None
        data, model, kind = prepare(recipe, here, start=resumed is None)
        prepared = data, model, kind, build_teacher(recipe, len(data.classes), here)
        cleanup.callback(run.release)
        here.on_first(lambda: run.start(recipe))
        progress = Progress(recipe.optim.epochs, here, quiet=quiet)
        cleanup.callback(progress.close)
        try:
            return _run(recipe, here, prepared, run, progress, resumed, report, stop, cleanup)
        except SystemExit:  # out of `report`: whoever listens ends the run; its last epoch is saved
            if here.first:
                run.write_outcome("saved")
            raise
        except (Exception, KeyboardInterrupt) as error:
            if here.first:
                run.write_outcome("failed", error=f"{type(error).__name__}: {error}"[:2000])
            raise


def _run(recipe, here, prepared, run, progress, resumed, report, stop, cleanup):
    (data, model, kind, teacher), optim, device = prepared, recipe.optim, here.device

    # ---- network, in the order that matters: device, calibration, then the wrappers
    model.to(device, memory_format=torch.channels_last if recipe.run.channels_last else torch.contiguous_format)
    loaders = build_loaders(recipe.data, data, recipe.run.seed, here.rank, here.size, device)
    normalize = Normalize(data, device, recipe.run.channels_last)
    if resumed is None and quantizers_of(model):
        _calibrate(recipe, here, model, loaders, normalize, progress)
    fold_relu_(model)
    if here.size > 1 and device.type == "cuda":
        model = sync_batch_norm(model)
    oscillations = track_oscillations(recipe, model)
    stepped = model
    if here.size > 1:
        with warnings.catch_warnings():
            # torch 2.15 announces another spelling of broadcast_buffers, which 2.11 does not have
            warnings.simplefilter("ignore", FutureWarning)
            stepped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                              broadcast_buffers=False)
    if recipe.run.compile:
        stepped = compiled(stepped, device)

    # ---- state: fresh or resumed
    average = WeightAverage(model, optim.ema_decay) if optim.ema_decay else None
    state = TrainState(model, Optimizers(model, optim), Counters(device), average)
    if resumed is not None:
        state.load_state_dict(resumed)
        if not here.first:
            state.counters.reset()  # the checkpoint has the sum over the ranks
    if here.first:
        run.cut_records(state.epoch)  # a line without its checkpoint is written again
    steps = loaders.train.steps
    total = steps * optim.epochs
    schedule = functools.partial(learning_rate, steps=total, warmup_steps=round(steps * optim.warmup_epochs),
                                 peak=optim.lr, warmup_lr=optim.warmup_lr)
    if here.first and state.step < total:
        run.write_outcome("running")
    progress.announce(recipe, state, data.name, kind, steps, run.path)
    log = TensorBoardLog(run.path, state.step, enabled=here.first and state.step < total)
    cleanup.callback(log.close)

    # ---- epochs
    while state.epoch < optim.epochs:
        began, first_step, waited = time.monotonic(), state.step, 0.0
        progress.start(state.epoch, state.step - state.epoch * steps, steps)
        model.train()
        if optim.freeze_bn:
            freeze_batch_norm_(model)
        fetched = time.monotonic()
        for images, labels, _ in loaders.train.epoch(state.epoch, state.step - state.epoch * steps):
            waited += time.monotonic() - fetched
            torch.manual_seed(_step_seed(recipe.run.seed, state.step, here.rank))
            dampening = oscillations.dampening(state.step / total) if oscillations else None
            labels = labels.to(device, non_blocking=True)
            backward(stepped, normalize(images), labels, recipe, state.counters, teacher, dampening)
            rate = schedule(state.step)
            state.optimizers.step(rate)
            state.step += 1
            if oscillations:
                oscillations.after_step_(state.step / total)
            if average:
                average.update_(state.step)
            progress.advance()
            if state.step % recipe.run.log_every == 0:
                log.step(state.step, rate, state.counters)
            if asked_to_stop(stop, here, state.step):
                return _save_and_stop(state, here, run, progress)
            fetched = time.monotonic()
        seconds = time.monotonic() - began
        metrics = {"epoch": state.epoch + 1, "step": state.step, "lr": schedule(state.step - 1),
                   **state.counters.read(here, "train"),
                   "images_per_second": (state.step - first_step) * recipe.data.batch / seconds,
                   "wait_share": waited / seconds}

        # ---- evaluation on the holdout; never on test
        metrics |= validate(recipe, here, state, loaders, normalize)
        layers = oscillations.count() if oscillations else {}
        if layers:
            metrics |= shares(layers)
        metrics["seconds"] = time.monotonic() - began
        # The training loss is that before the last update; val shows what the update left behind.
        diverged = not all(math.isfinite(metrics[key]) for key in ("train_loss", "val_loss") if key in metrics)
        improved = not diverged and "val_top1" in metrics and (
            state.best is None or metrics["val_top1"] > state.best["val_top1"])
        if improved:
            state.best = dict(metrics)
        state.epoch += 1
        state.counters.reset()
        if here.first:
            run.append(METRICS, metrics)
            log.epoch(metrics)
            if layers:
                run.append(OSCILLATIONS, {"epoch": state.epoch, "step": state.step, "layers": layers})
                log.oscillations(layers, state.step)
            if not diverged:
                checkpoint.save(run.path, state.state_dict(), best=improved)
        progress.finish(metrics, optim.epochs - state.epoch, metrics["seconds"])
        if diverged:
            state.outcome = "diverged"
            if here.first:
                run.write_outcome("diverged", epoch=state.epoch, step=state.step,
                                  error=f"train_loss {metrics['train_loss']}, val_loss {metrics.get('val_loss')}")
        if report is not None:
            report(metrics, run.path / "checkpoints")
        if diverged:
            progress.say(f"diverged in epoch {state.epoch}: a loss is no number; what was saved before it is in "
                         f"{run.path / 'checkpoints'}")
            return state

    state.outcome = "finished"
    if here.first:
        run.write_outcome("finished", epoch=state.epoch, best=state.best)
    return state


def _calibrate(recipe, here, model, loaders, normalize, progress):
    batches = first_batches(loaders.train, normalize, recipe.quant.calibration_batches)
    try:
        calibrate_(model, batches, recipe.quant.calibration)
    except ValueError as error:
        raise InputError(str(error)) from None
    if loaders.val is not None and not progress.quiet:  # a collective: all ranks are as quiet as rank 0
        found = evaluate(model, loaders.val, normalize, here, recipe.run.precision, "val")
        progress.say(f"after calibration, before training: val top-1 {found['val_top1']:.2f}")


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers inside the network (dropout) follow from (seed, step, rank): no state to save."""
    return (seed * 1_000_003 + step) * 4099 + rank


def _save_and_stop(state, here, run, progress):
    state.outcome = "saved"
    if here.device.type == "cpu":
        # Running averages: averaged over the ranks now or at the end is the same.
        average_batch_norm_(state.model.modules())
        if state.average:
            with state.average.applied():
                average_batch_norm_(state.model.modules())
    # Ranks count their own images of the epoch under way; the checkpoint is rank 0's and holds the sum.
    counted = here.sum_(state.counters.values.clone())
    if here.first:
        content = state.state_dict() | {"counters": counted}
        checkpoint.save(run.path, content)
        run.write_outcome("saved", requeue=True, epoch=state.epoch, step=state.step)
    progress.say(f"saved at step {state.step} of epoch {state.epoch + 1}; the same command continues")
    return state


# ---- command line


@exit_on_input_error
def main(argv: list[str]) -> int:
    parser = command_line.parser("python -m nulsq.train", "Train one recipe, then evaluate it once on the test images.")
    parser.add_argument("--dry-run", type=int, nargs="?", const=1, metavar="RANKS",
                        help="check everything (for so many ranks), print the plan, write nothing")
    arguments, recipe = command_line.parse(parser, argv)
    with world(recipe.run.device) as here:
        if arguments.dry_run is not None:
            data, model, kind = prepare(recipe, World(0, arguments.dry_run, here.device))
            build_teacher(recipe, len(data.classes), here)
            if here.first:
                print(summary(model))
                print(f"would train {recipe.optim.epochs} epochs on {data.name} ({kind} loader) in {path_of(recipe)}")
            return 0
        with stop_on_signal() as stop:
            state = train(recipe, stop=stop)
        if state.outcome == "saved":
            return EXIT_SAVED
        if state.outcome == "diverged":
            return EXIT_DIVERGED
        found = here.on_first(lambda: read_evaluation(path_of(recipe))) or evaluate_run(path_of(recipe), here=here)
        if here.first:
            print(f"test top-1 {found['test_top1']:.2f}  top-5 {found['test_top5']:.2f}  ({found['test_images']} "
                  f"images, {found['checkpoint']} checkpoint of epoch {found['epoch']})  {path_of(recipe)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
