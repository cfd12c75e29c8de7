"""A trial of several DDP workers: Ray Train inside a Tune function.

    Tune ── run(config)              the trial's driver, on the head node: starts the rest and reports
              └─ TrainController     Ray Train's: makes a placement group of `workers` bundles, polls the workers
                   ├─ train_rank(config)    rank 0, `cpus` and `gpus` of its own
                   └─ train_rank(config)    rank 1, on the same node or another

Every rank calls the same `nulsq.train.train`, which finds the process group that Ray Train has made (gloo on the CPU,
nccl on GPUs). `data.batch` is the global batch, so a trial of two workers is the trial of one process up to the order
of float sums. Only rank 0 writes, to the trial's run directory on a file system that all nodes share; Ray Train is
given no checkpoints to keep.

An epoch's way to the scheduler: every rank calls `ray.train.report`, a barrier; the controller collects the reports at
its next poll and hands rank 0's to `Tell`; the driver reads them from a queue and calls `ray.tune.report`. Training
goes on meanwhile. A trial that is stopped at a rung has therefore begun the next epoch, and may have ended it where an
epoch is shorter than a second.

Whoever fails, all start again: the error of a rank ends the trial, and Tune starts it anew as often as the search says
(`retries`). It continues from its run directory (see trial_protocol.py). Ray Train's own retries are off: they would
not report what was lost.

When Tune stops a trial it kills the driver; controller and workers die with it, and Ray's PlacementGroupCleaner frees
their places, which needs the dashboard (see tune/ray_backend/cluster.py).
"""

import os
import threading
from typing import Any

import ray.train
import ray.tune
import ray.util.queue

from tune.ray_backend.trial_protocol import as_result, recipe_of, told_before, wait_until_free

# What the trial's driver asks Tune for: a share of the head node, where it is safe from the loss of any other node,
# and no share of a core that a worker then lacks.
DRIVER = {"node:__internal_head__": 0.001}
# Unless they are set: how often workers are polled, at 2 s by default, bounds how fast epochs are reported. The watcher
# of preemption is one process more per trial, for a signal that nothing here listens to.
ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def run(config: dict[str, Any]) -> None:
    """The Tune function: `workers` processes train one trial. See trial_protocol.py for `config`."""
    from ray.train.torch import TorchTrainer

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    wait_until_free(config)
    for result in told_before(config):
        ray.tune.report(result)
    reports = ray.util.queue.Queue(actor_options={"num_cpus": 0})
    resources = {"CPU": config["cpus"]} | ({"GPU": config["gpus"]} if config["gpus"] else {})
    trainer = TorchTrainer(
        train_rank, train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=config["workers"], use_gpu=bool(config["gpus"]),
                                               resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=config["trial"]["key"].replace("/", "-"), storage_path=os.path.join(config["directory"], "ray-train"),
            callbacks=[Tell(reports)],
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0)))
    _fit(trainer, reports)


class Tell(ray.train.UserCallback):
    """Passes rank 0's metrics on to the trial's driver. Lives in the controller's process.

    Ray's own TuneReportCallback does this too, but its queue is read by the thread that Tune calls, and that thread
    waits for ever where the last epoch's report is still in the queue when the training has ended.
    """

    def __init__(self, reports: ray.util.queue.Queue):
        self.reports = reports

    def after_report(self, run_context, metrics, checkpoint):
        self.reports.put(metrics[0])


def train_rank(config: dict[str, Any]) -> None:
    """One rank, in a process of its own."""
    from nulsq.train import train

    os.chdir(config["folder"])

    def report(metrics, checkpoint_dir):
        ray.train.report(as_result(metrics, config["metric"]))

    train(recipe_of(config), report=report, quiet=True)


def _fit(trainer, reports):
    """Train, and report what arrives, in order, from this thread: it is the one that Tune stops."""
    errors = []

    def fit():
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    # A daemon: Tune ends this process, and a thread that waits for the controller must not hold it up.
    fitting = threading.Thread(target=fit, name="fit", daemon=True)
    fitting.start()
    while True:
        ended = not fitting.is_alive()  # asked first: what is reported by then is in the queue
        try:
            ray.tune.report(reports.get(block=not ended, timeout=0.5))
        except ray.util.queue.Empty:
            if ended:
                break
    if errors:
        raise _reason(errors[0])


def _reason(error):
    """What went wrong in the first of the ranks that failed; Ray's own error is pages long."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return error
    rank = min(failures)
    cause = getattr(failures[rank], "cause", None) or failures[rank]
    return RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}")
