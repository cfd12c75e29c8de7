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
from collections.abc import Callable
from pathlib import Path

import torch

from nulsq.config import Recipe, command_line
from nulsq.data import Normalize, build_loaders
from nulsq.distributed import Ranks, join_ranks
from nulsq.errors import InputError, exit_on_input_error
from nulsq.evaluate import evaluate, evaluate_run, read_evaluation
from nulsq.models.network import fold_for_training
from nulsq.models.teacher import build_teacher
from nulsq.quant.batch_norm import freeze_batch_norm_
from nulsq.quant.calibration.calibrate import calibrate_
from nulsq.quant.oscillation import oscillating_fraction
from nulsq.quant.projection import quantizers_of
from nulsq.quant.summary import summary
from nulsq.run import checkpoint
from nulsq.run.directory import METRICS, OSCILLATIONS, RunDirectory, path_of
from nulsq.run.status import RunStatus, read_outcome, write_status
from nulsq.run.tensorboard import TensorBoardLog
from nulsq.training import outcome
from nulsq.training.compile import compiled
from nulsq.training.divergence import DivergenceGuard, first_bad
from nulsq.training.ema import WeightAverage
from nulsq.training.memory import keep_freed_memory
from nulsq.training.metrics import Counters
from nulsq.training.optim import Optimizers, learning_rate
from nulsq.training.prepare import prepare
from nulsq.training.progress import Progress
from nulsq.training.state import TrainState, track_oscillations
from nulsq.training.step import training_step
from nulsq.training.stop import NOTHING, SAVE, SAVE_FILE, STOP, Asked, Stopped, stop_on_signal
from nulsq.training.validate import first_batches, validate

Report = Callable[[dict, Path], None]


def train(recipe: Recipe, *, report: Report | None = None, resume: Path | None = None,
          stop: Callable[[], bool] | None = None, quiet: bool = False) -> TrainState:
    """Train as the recipe says, from where its run directory stands, to the end or until `stop()`.

    Args:
        report: called once per epoch on every rank with the epoch's metrics and the checkpoints' folder; of a run that
            diverged once more, with losses and accuracies NaN.
        resume: a checkpoint file to continue from; None continues the run directory's newest good one, if there is one.
        stop: polled at step boundaries and in evaluation; any rank's True saves the state and returns (outcome
            "saved").
        quiet: print nothing.

    Returns the state at the end; `state.outcome` is finished, saved or diverged, as in outcome.json. May be called
    many times in one process: it leaves no thread, process group or global setting of torch behind.

    Raises InputError, before anything is written, for a recipe that cannot be run; later where a checkpoint cannot be
    written or data turn out damaged, with the checkpoints before it intact.
    """
    threads = torch.get_num_threads()
    with join_ranks(recipe.run.device) as ranks, contextlib.ExitStack() as cleanup:
        cleanup.enter_context(torch.random.fork_rng(devices=[ranks.device] if ranks.device.type == "cuda" else []))
        if ranks.device.type == "cpu":
            keep_freed_memory()
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
            cleanup.callback(torch.set_num_threads, threads)

        # ---- everything that can be wrong with the input is found here, before the run directory exists
        run = RunDirectory(path_of(recipe))
        resume = resume or ranks.on_first(lambda: checkpoint.newest(run.path))
        resumed = checkpoint.load(Path(resume)) if resume is not None else None
        data, model, kind = prepare(recipe, ranks, start=resumed is None)
        prepared = data, model, kind, build_teacher(recipe, len(data.classes), ranks)
        cleanup.callback(run.release)
        ranks.on_first(lambda: run.start(recipe))
        progress = Progress(recipe.optim.epochs, ranks, quiet=quiet)
        cleanup.callback(progress.close)
        try:
            return _run(recipe, ranks, prepared, run, progress, resumed, report, stop, cleanup)
        except SystemExit:  # out of `report`: whoever listens ends the run; its last epoch is saved
            if ranks.is_first and read_outcome(run.path)["outcome"] == "running":
                write_status(run.path, RunStatus.SAVED, requeue=False)
            raise
        except (Exception, KeyboardInterrupt) as error:
            with contextlib.suppress(OSError):  # a full disk is an error of its own; any rank may be the one that fails
                write_status(run.path, RunStatus.FAILED, error=f"{type(error).__name__}: {error}"[:2000])
            raise


def _run(recipe, ranks, prepared, run, progress, resumed, report, stop, cleanup):
    (data, model, kind, teacher), optim, device = prepared, recipe.optim, ranks.device

    # ---- network, in the order that matters: device, calibration, then the wrappers
    model.to(device, memory_format=torch.channels_last if recipe.run.channels_last else torch.contiguous_format)
    loaders = build_loaders(recipe.data, data, recipe.run.seed, ranks.rank, ranks.size, device, recipe.optim.epochs)
    normalize = Normalize(data, device, recipe.run.channels_last)
    asked = Asked(stop, ranks, run.path)
    if resumed is None and quantizers_of(model):
        _calibrate(recipe, ranks, model, loaders, normalize, progress, asked)
    model = fold_for_training(model, ranks.size, device)
    oscillations = track_oscillations(recipe, model)
    stepped = ranks.data_parallel(model)
    if recipe.run.compile:
        stepped = compiled(stepped, device)
        cleanup.callback(torch.compiler.reset)  # past its eighth network of one class a process would go eager

    # ---- state: fresh or resumed
    average = WeightAverage(model, optim.ema_decay) if optim.ema_decay else None
    state = TrainState(model, Optimizers(model, optim), Counters(device), average)
    step = training_step(recipe, ranks, state, stepped, teacher, oscillations)
    if resumed is not None:
        progress.say(state.load_state_dict(resumed, ranks))
    if ranks.is_first:
        run.truncate_records(state.epoch)  # a line without its checkpoint is written again
    steps = loaders.train.steps
    total = steps * optim.epochs
    schedule = functools.partial(learning_rate, steps=total, warmup_steps=round(steps * optim.warmup_epochs),
                                 peak=optim.lr, warmup_lr=optim.warmup_lr, shape=optim.schedule)
    if state.epoch < optim.epochs:
        ranks.on_first(lambda: write_status(run.path, RunStatus.RUNNING))
    progress.announce(recipe, state, data.name, kind, steps, run.path)
    log = TensorBoardLog(run.path, state.step, enabled=ranks.is_first and state.step < total)
    cleanup.callback(log.close)
    guard = DivergenceGuard(recipe.guard, len(data.classes), ranks)
    if resumed is None:
        outcome.save(state, ranks, run)  # where a run goes back to that goes wrong in its first steps

    # ---- epochs
    bad = images = None  # the step that went wrong, once one has
    while state.epoch < optim.epochs:
        if bad is not None:
            if len(state.skipped) >= recipe.guard.rollbacks:
                where = first_bad(model, normalize(images))
                state, metrics = outcome.diverged(state, ranks, run, progress, bad, where)
                if report is not None:
                    report(metrics, run.path / "checkpoints")
                return state
            skipped = [*state.skipped, bad]
            state.load_state_dict(checkpoint.load(ranks.on_first(lambda: checkpoint.newest(run.path))), ranks)
            step.replaced()
            state.skipped, bad = skipped, None
            guard.forget(watched=skipped[-1] + recipe.guard.every)
            progress.say(f"step {skipped[-1]} went wrong; going back to step {state.step} and leaving its batch out "
                         f"({len(skipped)} of at most {recipe.guard.rollbacks})")
        began, first_step, waited = time.monotonic(), state.step, 0.0
        progress.start(state.epoch, state.step - state.epoch * steps, steps)
        model.train()
        if optim.freeze_bn:
            freeze_batch_norm_(model)
        fetched = time.monotonic()
        for images, labels, _ in loaders.train.epoch(state.epoch, state.step - state.epoch * steps):
            waited += time.monotonic() - fetched
            rate = schedule(state.step)
            if state.step not in state.skipped:
                torch.manual_seed(_step_seed(recipe.run.seed, state.step, ranks.rank))
                labels = labels.to(device, non_blocking=True)
                loss, norm = step.gradients(normalize(images), labels, state.step / total)
                bad = guard.look(state.step, loss, norm, state.level)
                if bad is not None:
                    break
                step.update(rate, (state.step + 1) / total)
                if average:
                    average.update_(state.step + 1)
            state.step += 1
            progress.advance()
            if state.step % recipe.run.log_every == 0:
                log.step(state.step, rate, state.counters)
            answer = asked(state.step)
            if answer != NOTHING or recipe.run.save_every and state.step % recipe.run.save_every == 0:
                bad = guard.check(state.level)
                if bad is not None:
                    break
                outcome.save(state, ranks, run)
                if answer == STOP:
                    return outcome.saved(state, ranks, run, progress)
                if answer == SAVE:
                    progress.say(f"saved at step {state.step}, as {SAVE_FILE} asked for")
                    ranks.on_first(asked.answered)
            fetched = time.monotonic()
        if bad is None:
            bad = guard.check(state.level)
        if bad is not None:
            continue
        seconds = time.monotonic() - began
        metrics = {"epoch": state.epoch + 1, "step": state.step, "lr": schedule(state.step - 1),
                   **state.counters.read(ranks, "train"),
                   "images_per_second": (state.step - first_step) * recipe.data.batch / seconds,
                   "wait_share": waited / seconds}

        # ---- evaluation on the holdout; never on test
        try:
            metrics |= validate(recipe, ranks, state, loaders, normalize, asked)
        except Stopped:
            outcome.save(state, ranks, run)
            return outcome.saved(state, ranks, run, progress)
        if not math.isfinite(metrics.get("val_loss", 0.0)):
            bad = state.step - 1  # its loss, that before the update, was good
            continue
        layers = oscillations.count() if oscillations else {}
        if layers:
            metrics |= oscillating_fraction(layers)
        metrics["seconds"] = time.monotonic() - began
        if "val_top1" in metrics and (state.best is None or metrics["val_top1"] > state.best["val_top1"]):
            state.best = dict(metrics)
        state.epoch += 1
        state.counters.reset()
        if ranks.is_first:
            run.append(METRICS, metrics)
            log.epoch(metrics)
            if layers:
                run.append(OSCILLATIONS, {"epoch": state.epoch, "step": state.step, "layers": layers})
                log.oscillations(layers, state.step)
        outcome.save(state, ranks, run)
        progress.finish(metrics, optim.epochs - state.epoch, metrics["seconds"])
        if report is not None:
            report(metrics, run.path / "checkpoints")

    return outcome.finished(state, ranks, run)


def _calibrate(recipe, ranks, model, loaders, normalize, progress, asked):
    batches = first_batches(loaders.train, normalize, recipe.quant.calibration_batches)
    try:
        calibrate_(model, batches, recipe.quant.calibration)
    except ValueError as error:
        raise InputError(str(error)) from None
    if loaders.val is not None and not progress.quiet:  # a collective: all ranks are as quiet as rank 0
        with contextlib.suppress(Stopped):  # the first step stops
            found = evaluate(model, loaders.val, normalize, ranks, recipe, "val", asked)
            progress.say(f"after calibration, before training: val top-1 {found['val_top1']:.2f}")


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers inside the network (dropout) follow from (seed, step, rank): no state to save."""
    return (seed * 1_000_003 + step) * 4099 + rank


# ---- command line


@exit_on_input_error
def main(argv: list[str]) -> int:
    parser = command_line.parser("python -m nulsq.train", "Train one recipe, then evaluate it once on the test images.")
    parser.add_argument("--dry-run", type=int, nargs="?", const=1, metavar="RANKS",
                        help="check everything (for so many ranks), print the plan, write nothing")
    parser.add_argument("--no-test", action="store_true",
                        help="leave the test images closed after the run: for trials of a search")
    arguments, recipe = command_line.parse(parser, argv)
    with join_ranks(recipe.run.device) as ranks:
        if arguments.dry_run is not None:
            data, model, kind = prepare(recipe, Ranks(0, arguments.dry_run, ranks.device))
            build_teacher(recipe, len(data.classes), ranks)
            if ranks.is_first:
                print(summary(model))
                print(f"would train {recipe.optim.epochs} epochs on {data.name} ({kind} loader) in {path_of(recipe)}")
            return 0
        with stop_on_signal() as stop:
            state = train(recipe, stop=stop)
            if state.outcome == "saved":
                return outcome.EXIT_SAVED
            if state.outcome == "diverged":
                return outcome.EXIT_DIVERGED
            if arguments.no_test:
                return 0
            path = path_of(recipe)
            try:
                found = ranks.on_first(lambda: read_evaluation(path)) or evaluate_run(
                    path, ranks=ranks, asked=Asked(stop, ranks, path))
            except Stopped:
                ranks.on_first(lambda: write_status(path, RunStatus.SAVED, epoch=state.epoch, step=state.step))
                return outcome.EXIT_SAVED
        if ranks.is_first:
            print(f"test top-1 {found['test_top1']:.2f}  top-5 {found['test_top5']:.2f}  ({found['test_images']} "
                  f"images, {found['checkpoint']} checkpoint of epoch {found['epoch']})  {path_of(recipe)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
