"""One Ray Tuner runs all trials of a search: its searcher gives them out, its scheduler stops them early."""

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path

import ray.tune

from nulsq.text import duration
from tune.checks import NetworkCosts
from tune.queue import TrialQueue
from tune.ray_backend import trial, workers
from tune.ray_backend.cluster import check_fits, check_placement, open_cluster
from tune.ray_backend.progress import Watch
from tune.ray_backend.scheduler import StratifiedAsha
from tune.ray_backend.searcher import StudySearcher
from tune.space import Search, base_recipe, full_epochs
from tune.store import journal
from tune.store.directory import SearchDirectory


def run_trials(search: Search, folder: SearchDirectory, course: TrialQueue, costs: NetworkCosts,
               seconds: float | None) -> bool:
    """Run the trials on Ray, for so many seconds at most. Returns whether all of them ended."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each trial's run directory has its own logs
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Watch says what happens
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")  # a stopped trial's end, before the next takes over
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    began = time.monotonic()
    with open_cluster(search.address, search.workers, search.nodes, search.patience), contextlib.ExitStack() as cleanup:
        most = check_fits(search.cpus, search.gpus, search.workers)
        print(f"Ray is up after {duration(time.monotonic() - began)}; {most} trials fit at once", flush=True)
        if search.workers > 1:
            check_placement(search.cpus, search.gpus, search.workers)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Watch tells what went wrong, in one line
        tuner = _tuner(search, folder.path.resolve(), course, costs, min(most, search.concurrent or most))
        journal.event(folder.path, "session")
        # Tune returns on SIGINT and SIGUSR1, with handlers that it leaves in place; a batch system sends SIGTERM.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            cleanup.callback(signal.signal, number, signal.getsignal(number))
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        if seconds is not None:
            timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.daemon = True
            timer.start()
            cleanup.callback(timer.cancel)
        with contextlib.suppress(KeyboardInterrupt):  # before Tune has its handlers
            tuner.fit()
        journal.event(folder.path, "pause")
        return course.finished


def _tuner(search, folder, course, costs, most):
    common = {"directory": str(folder), "folder": os.getcwd(), "metric": search.metric, "cpus": search.cpus,
              "gpus": search.gpus, "workers": search.workers, "recipe": str(Path(search.recipe).resolve())}
    one = {"cpu": search.cpus} | ({"gpu": search.gpus} if search.gpus else {})
    trainable = ray.tune.with_resources(trial.run, one) if search.workers == 1 else \
        ray.tune.with_resources(workers.run, workers.DRIVER)
    session = sum(event["event"] == "session" for event in journal.events(folder))
    return ray.tune.Tuner(
        trainable,
        tune_config=ray.tune.TuneConfig(
            search_alg=StudySearcher(course, folder, common,
                                     lambda each: costs.of(base_recipe(search, each.overrides))),
            scheduler=StratifiedAsha(full_epochs(search), grace=search.grace, reduction=search.reduction,
                                     metric=search.metric, mode=search.mode, file=folder / "rungs"),
            num_samples=2 * course.budget(),  # the searcher says when it is at the end
            max_concurrent_trials=most, reuse_actors=search.reuse and search.workers == 1,
            trial_name_creator=_trial_name, trial_dirname_creator=_trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name=f"session-{session}", storage_path=str(folder / "ray"), verbose=0,
            callbacks=[Watch(course, folder), *_loggers(search, folder)],
            failure_config=ray.tune.FailureConfig(max_failures=search.retries),
        ),
    )


def _loggers(search, folder):
    """Ray's own callbacks for the services that people keep their experiments in."""
    if search.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback
        # By default its files are in Ray's temporary folder, and what Tune copies of them may lack the end.
        yield WandbLoggerCallback(project=search.wandb, group=search.name, excludes=["config"],
                                  dir=os.environ.get("WANDB_DIR") or str(folder))
    if search.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback
        yield MLflowLoggerCallback(tracking_uri=search.mlflow, experiment_name=search.name)


def _trial_name(trial):
    return trial.config["trial"]["key"].replace("/", "-")
