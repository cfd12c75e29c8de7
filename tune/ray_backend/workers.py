"""A trial of several DDP workers: Ray Train inside a Tune function.

    Tune ── run(config)              the trial's driver, on the head node: starts the rest and reports
              └─ TrainController     Ray Train's: makes a placement group of `workers` bundles, polls the workers
                   ├─ train_rank(config)    rank 0, with `cpus` and `gpus` of its own
                   └─ train_rank(config)    rank 1, on the same node or another

Every rank calls the same `nulsq.train.train`, which finds the process group that Ray Train has made (gloo on the CPU,
nccl on GPUs). `data.batch` is the global batch, so a trial of two workers equals the trial of one process up to the
order of float sums. Only rank 0 writes, to the trial's run directory on a file system that all nodes share. Ray Train
gets no checkpoints to keep.

How an epoch's metrics reach the scheduler: every rank calls `ray.train.report`, which is a barrier. The controller
collects the reports at its next poll and passes those of rank 0 to `ForwardReports`. The driver reads them from a queue
and calls `ray.tune.report`. Training continues meanwhile. A trial that is stopped at a rung has therefore begun the
next epoch, and may have completed it where an epoch is shorter than a second.

If one rank fails, all start again: its error ends the trial, and Tune restarts the trial up to `retries` times. It
continues from its run directory (see trial_protocol.py). Ray Train's own retries are off, because they would not report
what was lost.

When Tune stops a trial it kills the driver. Controller and workers die with it, and Ray's PlacementGroupCleaner frees
their resources, which needs the dashboard (see tune/ray_backend/cluster.py).
"""

import os
import threading
from pathlib import Path
from typing import Any

import ray.train
import ray.tune
import ray.util.queue

from tune.ray_backend.trial_protocol import TrialSettings, as_result, completed_results, wait_until_free

# Resources of a trial's driver: a share of the head node, which survives the loss of any other node, and no share of a
# core, which a worker would then lack.
DRIVER = {"node:__internal_head__": 0.001}
# Unless the user has set them. Workers are polled every 2 s by default, which would limit how fast epochs are reported.
# The preemption watcher would be one more process per trial, for a signal that nothing here uses.
ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def run(config: dict[str, Any]) -> None:
    """The Tune function: `workers` processes train one trial. `config`: see `TrialSettings.to_config`."""
    from ray.train.torch import TorchTrainer

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    settings = TrialSettings.from_config(config)
    wait_until_free(settings)
    for result in completed_results(settings):
        ray.tune.report(result)
    reports = ray.util.queue.Queue(actor_options={"num_cpus": 0})
    resources = {"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {})
    trainer = TorchTrainer(
        train_rank, train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=settings.workers, use_gpu=bool(settings.gpus),
                                               resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=settings.key.replace("/", "-"), storage_path=os.path.join(settings.search_directory, "ray-train"),
            callbacks=[ForwardReports(reports)],  # type: ignore[list-item]  # Ray exports V1's types, runs V2
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=0, max_preemption_failures=0)))
    _fit(trainer, reports)


class ForwardReports(ray.train.UserCallback):
    """Passes rank 0's metrics to the trial's driver. Runs in the controller's process.

    Ray's own TuneReportCallback does this too. But the thread that Tune calls reads its queue, and waits forever if the
    last epoch's report is still in the queue when the training has ended.
    """

    def __init__(self, reports: ray.util.queue.Queue) -> None:
        self.reports = reports

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]],
                     checkpoint: ray.train.Checkpoint | None) -> None:
        self.reports.put(metrics[0])


def train_rank(config: dict[str, Any]) -> None:
    """One rank, in a process of its own."""
    from nulsq.train import train

    settings = TrialSettings.from_config(config)
    os.chdir(settings.working_directory)

    def report(metrics: dict[str, Any], checkpoint_dir: Path | None = None) -> None:
        ray.train.report(as_result(metrics, settings.metric))

    train(settings.load_recipe(), report=report, quiet=True)


def _fit(trainer: "ray.train.torch.TorchTrainer", reports: ray.util.queue.Queue) -> None:
    """Train, and report results in order from this thread, the one that Tune stops."""
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    # A daemon thread: Tune ends this process, and a thread that waits for the controller must not delay that.
    fitting = threading.Thread(target=fit, name="fit", daemon=True)
    fitting.start()
    while True:
        ended = not fitting.is_alive()  # checked first: all reports are in the queue by then
        try:
            ray.tune.report(reports.get(block=not ended, timeout=0.5))
        except ray.util.queue.Empty:
            if ended:
                break
    if errors:
        raise _cause(errors[0])


def _cause(error: BaseException) -> BaseException:
    """The error of the first rank that failed; Ray's own error is pages long."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return error
    rank = min(failures)
    cause = getattr(failures[rank], "cause", None) or failures[rank]
    return RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}")
