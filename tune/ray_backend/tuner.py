"""One Ray Tuner runs all trials of a search: its searcher suggests them, its scheduler stops them early.

Ray reads its token when it is imported, and `open_cluster` sets the token. So modules that import Ray are imported
inside `_tuner`, after that.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nulsq.text import duration
from tune.checks import NetworkCosts
from tune.queue import TrialQueue
from tune.ray_backend.cluster import check_fits, check_placement, open_cluster
from tune.ray_backend.trial_protocol import TrialSettings
from tune.space import Search, base_recipe, full_epochs
from tune.store import journal
from tune.store.directory import RUNGS, SearchDirectory

if TYPE_CHECKING:
    import ray.tune

ENVIRONMENT = {  # unless the user has set them
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial's run directory has its own logs
    "RAY_AIR_NEW_OUTPUT": "0",  # SearchProgress prints instead
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # how long a stopped trial may take to end before the next one starts
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_trials(search: Search, folder: SearchDirectory, queue: TrialQueue, costs: NetworkCosts,
               seconds: float | None) -> bool:
    """Run the trials on Ray, for at most `seconds` (None: no limit). Returns whether all of them ended."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    began = time.monotonic()
    with open_cluster(search.address, search.workers, search.nodes, search.patience), contextlib.ExitStack() as cleanup:
        fitting = check_fits(search.cpus, search.gpus, search.workers)
        print(f"Ray is up after {duration(time.monotonic() - began)}; {fitting} trials fit at once", flush=True)
        if search.workers > 1:
            check_placement(search.cpus, search.gpus, search.workers)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # SearchProgress prints errors, in one line each
        tuner = _tuner(search, folder.path.resolve(), queue, costs, min(fitting, search.concurrent or fitting))
        journal.event(folder.path, "session")
        # Tune returns on SIGINT and SIGUSR1, and does not restore the handlers. Batch systems send SIGTERM.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            cleanup.callback(signal.signal, number, signal.getsignal(number))
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        if seconds is not None:
            timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.daemon = True
            timer.start()
            cleanup.callback(timer.cancel)
        with contextlib.suppress(KeyboardInterrupt):  # raised before Tune has installed its handlers
            tuner.fit()
        journal.event(folder.path, "pause")
        return queue.finished


def _tuner(search: Search, folder: Path, queue: TrialQueue, costs: NetworkCosts, concurrent: int) -> "ray.tune.Tuner":
    import ray.tune

    from tune.ray_backend import trial, workers
    from tune.ray_backend.progress import SearchProgress
    from tune.ray_backend.scheduler import StratifiedAsha
    from tune.ray_backend.searcher import StudySearcher

    resources = {"cpu": search.cpus} | ({"gpu": search.gpus} if search.gpus else {})
    trainable = ray.tune.with_resources(trial.run, resources) if search.workers == 1 else \
        ray.tune.with_resources(workers.run, workers.DRIVER)
    session = sum(event["event"] == "session" for event in journal.events(folder))
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=StudySearcher(queue, folder, lambda new: costs.of(base_recipe(search, new.overrides))),
            scheduler=StratifiedAsha(full_epochs(search), grace=search.grace, reduction=search.reduction,
                                     metric=search.metric, mode=search.mode, file=folder / RUNGS),
            num_samples=2 * queue.budget(),  # an upper bound: the searcher returns FINISHED at the end
            max_concurrent_trials=concurrent, reuse_actors=search.reuse and search.workers == 1,
            trial_name_creator=_trial_name, trial_dirname_creator=_trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name=f"session-{session}", storage_path=str(folder / "ray"), verbose=0,
            callbacks=[SearchProgress(queue, folder), *_loggers(search, folder)],
            failure_config=ray.tune.FailureConfig(max_failures=search.retries),
        ),
    )


def _loggers(search: Search, folder: Path) -> "Iterator[ray.tune.Callback]":
    """Ray's own callbacks for Weights & Biases and MLflow."""
    if search.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback
        # By default it writes to Ray's temporary folder, and Tune's copy of that may lack the end.
        yield WandbLoggerCallback(project=search.wandb, group=search.name, excludes=["config"],
                                  dir=os.environ.get("WANDB_DIR") or str(folder))
    if search.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback
        yield MLflowLoggerCallback(tracking_uri=search.mlflow, experiment_name=search.name)


def _trial_name(tune_trial: "ray.tune.experiment.Trial") -> str:
    return TrialSettings.from_config(tune_trial.config).key.replace("/", "-")
