"""Search hyperparameters over a grid of studies with ASHA, on this machine or a running Ray cluster.

    python -m tune.search configs/search/demo.yaml --dry-run
    python -m tune.search configs/search/demo.yaml trials=12 space.lr.high=0.2

The same command continues a search that was interrupted, and shows the results of one that is finished.
Selection sees the holdout only; each study's winner is evaluated once on the test images at the end.
"""

import fcntl
import logging
import os
import secrets
import sys
import time
from pathlib import Path

from nulsq.config import describe, flatten, load, to_yaml
from nulsq.errors import InputError, Parser, exit_on_input_error, require
from nulsq.progress import duration
from nulsq.run_directory import write_atomically
from nulsq.train import prepare
from nulsq.world import World, world
from tune.space import Search, base_recipe, load_search, rungs, studies, trials

ROOT = Path(__file__).resolve().parent.parent
EXIT_INTERRUPTED = 99
# Settings that may differ when a search is continued: they do not change what the trials are.
FREE = {"cpus", "gpus", "concurrent", "retries", "dir"}


@exit_on_input_error
def main(argv: list[str]) -> int:
    epilog = "\n".join(["settings (key=default):", *describe(Search)])
    parser = Parser(prog="python -m tune.search", description=__doc__, epilog=epilog)
    parser.add_argument("search", help="YAML file, see configs/search/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, they win over the file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--address", help="a running Ray cluster; default: start one on this machine")
    arguments = parser.parse_intermixed_args(argv)
    search = load_search(arguments.search, arguments.overrides)
    with world("auto") as here:
        for study in studies(search):
            prepare(base_recipe(search, study.overrides), World(0, 1, here.device))
    print(plan(search), flush=True)
    if arguments.dry_run:
        return 0
    with _locked(search):
        return run(search, arguments.address)


def plan(search: Search) -> str:
    """Studies, rungs, trials and the budget in epochs."""
    lines = [f"search {search.name} in {search.directory}: {len(studies(search))} studies of {search.trials} trials, "
             f"ranked by {search.metric} on the holdout"]
    most = least = 0
    for study in studies(search):
        epochs = base_recipe(search, study.overrides).optim.epochs
        steps = [*rungs(epochs, search.grace, search.reduction), epochs]
        full = search.trials * epochs
        # What synchronous halving would spend; the asynchronous form promotes somewhat more.
        halved, before, alive = 0, 0, float(search.trials)
        for step in steps:
            halved += max(1, alive) * (step - before)
            before, alive = step, alive / search.reduction
        most, least = most + full, least + halved
        settings = ", ".join(f"{key}={value}" for key, value in study.overrides.items())
        lines.append(f"  {study.name}: {settings or 'the recipe as it is'}; rungs at epochs "
                     f"{', '.join(map(str, steps[:-1])) or 'none'} of {epochs}")
    for name, sampler in search.space.items():
        ends = ", ".join(map(str, sampler.ends())) if sampler.sample == "choice" else \
            f"{sampler.low:g} to {sampler.high:g}"
        lines.append(f"  {name}: {sampler.key}, {sampler.sample} {ends}")
    lines.append(f"budget: at most {most} epochs, about {round(least)} or more with early stopping")
    return "\n".join(lines)


def run(search: Search, address: str | None = None) -> int:
    """Start or continue the search, write its results. Returns the exit code."""
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        # Ray's servers listen on every interface, so a token guards them; this one lives as long as the search.
        # Ray reads it when it is imported.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    require("matplotlib", "search")  # looked for before hours are spent
    require("ray.tune", "search")
    from tune import results

    if not (search.directory / "finished").is_file() and not _fit(search, address):
        print(f"interrupted; the same command continues the search in {search.directory}")
        return EXIT_INTERRUPTED
    rows = results.collect(search, trials(search))
    best = results.winners(search, rows)
    if not best:
        print(f"error: no trial finished an epoch; the reasons are in {search.directory}/ray/*/error.txt and "
              f"{search.directory}/trials/*/*/outcome.json; the same command tries again", file=sys.stderr)
        return 1
    (search.directory / "finished").touch()
    print("evaluating each study's winner on the test images", flush=True)
    tests = results.evaluate_winners(best)
    made = results.write(search, rows, tests)
    print()
    print(results.leaderboard(search, rows, tests))
    print("\n".join(str(path) for path in made))
    return 0


def _fit(search: Search, address: str | None) -> bool:
    """Run the trials on Ray. Returns whether all of them ended."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each trial's run directory has its own logs
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Watch says what happens
    import ray
    import ray.tune

    from tune.trial import run as trainable

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Watch tells what went wrong, in one line

    storage = search.directory.resolve()
    started = not ray.is_initialized()
    if started:
        _start_ray(search, address)
    try:
        resources = {"cpu": search.cpus} | ({"gpu": search.gpus} if search.gpus else {})
        _check_resources(ray.cluster_resources(), search)
        prepared = ray.tune.with_resources(trainable, resources)
        experiment = str(storage / "ray")
        if ray.tune.Tuner.can_restore(experiment):
            print("continuing where the search was interrupted", flush=True)
            tuner = ray.tune.Tuner.restore(experiment, trainable=prepared, resume_unfinished=True, resume_errored=True)
        else:
            tuner = _tuner(search, prepared, storage)
        grid = tuner.fit()
        ended = [result.error is not None or (result.metrics or {}).get("done", False) for result in grid]
        return len(ended) == len(trials(search)) and all(ended)
    finally:
        if started:
            ray.shutdown()


def _tuner(search, trainable, storage):
    import ray.tune

    from tune.scheduler import StratifiedAsha
    from tune.watch import Watch

    every = trials(search)
    common = {"directory": str(storage), "folder": os.getcwd(), "cpus": search.cpus, "metric": search.metric,
              "recipe": str(Path(search.recipe).resolve())}
    listed = [{"study": each.study, "number": each.number, "overrides": search.overrides | each.overrides}
              for each in every]
    epochs = {study.name: base_recipe(search, study.overrides).optim.epochs for study in studies(search)}
    return ray.tune.Tuner(
        trainable,
        param_space=common | {"trial": ray.tune.grid_search(listed)},  # a grid keeps the list's order
        tune_config=ray.tune.TuneConfig(
            scheduler=StratifiedAsha(epochs, grace=search.grace, reduction=search.reduction, metric=search.metric,
                                     mode=search.mode, file=storage / "rungs"),
            max_concurrent_trials=search.concurrent,
            trial_name_creator=_trial_name, trial_dirname_creator=_trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name="ray", storage_path=str(storage), verbose=0, callbacks=[Watch(search.metric, len(every))],
            failure_config=ray.tune.FailureConfig(max_failures=search.retries),
        ),
    )


def _trial_name(trial):
    which = trial.config["trial"]
    return f"{which['study']}-{which['number']:03d}"


def _start_ray(search, address):
    """Join a cluster, or start one here, without a dashboard."""
    import ray

    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                   "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    options = {"runtime_env": {"env_vars": environment}, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": 256 * 2**20,
                    "num_cpus": max(os.cpu_count() or 1, int(search.cpus))}
    began = time.monotonic()
    ray.init(address=address, **options)
    print(f"Ray is up after {duration(time.monotonic() - began)}: "
          f"{ray.cluster_resources().get('CPU', 0):g} CPU, {ray.cluster_resources().get('GPU', 0):g} GPU", flush=True)


def _check_resources(there, search):
    for name, wanted in (("CPU", search.cpus), ("GPU", search.gpus)):
        if wanted > there.get(name, 0):
            raise InputError(f"{name.lower()}s = {wanted:g} per trial, the cluster has {there.get(name, 0):g} {name}")


class _locked:
    """Make or take up the search's directory; one process at a time, one search per directory."""

    def __init__(self, search: Search):
        self.search = search

    def __enter__(self):
        folder = self.search.directory
        saved = folder / "search.yaml"
        if saved.is_file():
            before, now = flatten(load(Search, saved)), flatten(self.search)
            changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in sorted(before.keys() | now.keys())
                       if key not in FREE and before.get(key) != now.get(key)]
            if changed:
                raise InputError(f"{folder} holds another search ({'; '.join(changed[:3])}); choose another dir")
        elif folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} exists and holds something else; choose another dir")
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "lock").open("a")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is searching in {folder}") from None
        if not saved.is_file():
            write_atomically(saved, to_yaml(self.search))

    def __exit__(self, *_):
        self.file.close()


if __name__ == "__main__":
    raise SystemExit(main())
