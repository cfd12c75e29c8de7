"""Search hyperparameters over a grid of studies with ASHA, on this machine.

    python -m tune.search configs/search/demo.yaml --dry-run
    python -m tune.search configs/search/demo.yaml trials=12 space.lr.high=0.2

The same command continues a search that was interrupted, and shows the results of one that is finished.
Selection sees the holdout only; each study's winner is evaluated once on the test images at the end.
Exit codes: 0 finished, 1 nothing could be trained, 2 input that cannot be used, 99 interrupted.
"""

import logging
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import torch

from nulsq.config import describe
from nulsq.distill import build_teacher
from nulsq.errors import InputError, Parser, exit_on_input_error, require
from nulsq.progress import duration
from nulsq.train import prepare
from nulsq.world import World
from tune.search_directory import SearchDirectory
from tune.space import Search, base_recipe, load_search, rungs, studies, trials

ROOT = Path(__file__).resolve().parent.parent
EXIT_INTERRUPTED = 99


def parser() -> Parser:
    made = Parser(prog="python -m tune.search", description=__doc__,
                  epilog="\n".join(["settings (key=default):", *describe(Search)]))
    made.add_argument("search", help="YAML file, see configs/search/")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings, they win over the file")
    made.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    search = load_search(arguments.search, arguments.overrides)
    folder = SearchDirectory(search)
    folder.check()
    if not folder.finished:
        _check(search)
        print(plan(search), flush=True)
        if not arguments.dry_run:
            with folder:
                return run(search, folder)
    if not arguments.dry_run:
        return show(search, folder)
    return 0


def plan(search: Search) -> str:
    """Studies, rungs, trials and the budget in epochs."""
    lines = [f"search {search.name} in {search.directory}: {len(studies(search))} studies of {search.trials} trials, "
             f"ranked by {search.metric} on the holdout"]
    most = least = 0
    for study in studies(search):
        epochs = base_recipe(search, study.overrides).optim.epochs
        steps = [*rungs(epochs, search.grace, search.reduction), epochs]
        # What synchronous halving would spend; the asynchronous form promotes somewhat more.
        before, alive = 0, float(search.trials)
        for step in steps:
            least += max(1, alive) * (step - before)
            before, alive = step, alive / search.reduction
        most += search.trials * epochs
        settings = ", ".join(f"{key}={value}" for key, value in study.overrides.items())
        lines.append(f"  {study.name}: {settings or 'the recipe as it is'}; rungs at epochs "
                     f"{', '.join(map(str, steps[:-1])) or 'none'} of {epochs}")
    for name, sampler in search.space.items():
        ends = ", ".join(map(str, sampler.ends())) if sampler.sample == "choice" else \
            f"{sampler.low:g} to {sampler.high:g}"
        lines.append(f"  {name}: {sampler.key}, {sampler.sample} {ends}")
    lines.append(f"budget: at most {most} epochs, about {round(least)} or more with early stopping")
    if torch.cuda.is_available() and not search.gpus:
        lines.append("trials run on the CPU although there is a GPU: set gpus=1, or a fraction")
    return "\n".join(lines)


def run(search: Search, folder: SearchDirectory) -> int:
    """Start or continue the search, then show and write its results. Returns the exit code."""
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's servers listen on every interface, so a token guards them; this one lives as long as the search.
        # Ray reads it when it is imported.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    require("matplotlib", "search")  # looked for before hours are spent
    require("ray.tune", "search")
    if not _fit(search, folder):
        print(f"interrupted; the same command continues the search in {search.directory}")
        return EXIT_INTERRUPTED
    return show(search, folder)


def show(search: Search, folder: SearchDirectory) -> int:
    """Results of a search whose trials have ended: winners on test, leaderboard, files."""
    from tune import results

    rows = results.collect(search, trials(search))
    best = results.winners(search, rows)
    if not best:
        print(f"error: no trial finished an epoch; the reasons are in {search.directory}/ray/*/error.txt and "
              f"{search.directory}/trials/*/*/outcome.json; the same command tries again", file=sys.stderr)
        return 1
    folder.mark_finished()
    print("each study's winner on the test images ...", flush=True)
    tests = results.evaluate_winners(best)
    made = results.write(search, rows, tests)
    print()
    print(results.leaderboard(search, rows, tests))
    print("\n".join(str(path) for path in made))
    return 0


def _check(search: Search) -> None:
    """Build each study's network and open its data; ask whether a trial fits on this machine."""
    here = World(0, 1, torch.device("cpu"))
    for study in studies(search):
        recipe = base_recipe(search, study.overrides)
        data, _, _ = prepare(recipe, here)
        build_teacher(recipe, len(data.classes), here)
    there = {"cpus": len(os.sched_getaffinity(0)), "gpus": torch.cuda.device_count()}
    for name, count in there.items():
        if getattr(search, name) > count:
            raise InputError(f"{name} = {getattr(search, name):g} per trial, this machine has {count}")


def _fit(search: Search, folder: SearchDirectory) -> bool:
    """Run the trials on Ray. Returns whether all of them ended."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each trial's run directory has its own logs
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Watch says what happens
    import ray
    import ray.tune

    from tune.trial import run as trainable

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Watch tells what went wrong, in one line
    began = time.monotonic()
    # "local": never join another user's Ray that happens to run here. No dashboard: nothing needs it.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                   "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    ray.init(address="local", runtime_env={"env_vars": environment}, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_store_memory=256 * 2**20)
    # Tune saves and returns on SIGINT and SIGUSR1; a batch system sends SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        resources = ray.cluster_resources()
        print(f"Ray is up after {duration(time.monotonic() - began)}: {resources.get('CPU', 0):g} CPU, "
              f"{resources.get('GPU', 0):g} GPU", flush=True)
        wanted = {"cpu": search.cpus} | ({"gpu": search.gpus} if search.gpus else {})
        prepared = ray.tune.with_resources(trainable, wanted)
        experiment = str(folder.path.resolve() / "ray")
        if ray.tune.Tuner.can_restore(experiment):
            print("continuing where the search was interrupted", flush=True)
            tuner = ray.tune.Tuner.restore(experiment, trainable=prepared, resume_unfinished=True, resume_errored=True)
        else:
            tuner = _tuner(search, prepared, folder.path.resolve())
        grid = tuner.fit()
        ended = [result.error is not None or (result.metrics or {}).get("done", False) for result in grid]
        return len(ended) == len(trials(search)) and all(ended)
    finally:
        ray.shutdown()


def _tuner(search, trainable, storage):
    import ray.tune

    from tune.scheduler import StratifiedAsha
    from tune.watch import Watch

    every = trials(search)
    common = {"directory": str(storage), "folder": os.getcwd(), "metric": search.metric, "cpus": search.cpus,
              "gpus": search.gpus, "recipe": str(Path(search.recipe).resolve())}
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


if __name__ == "__main__":
    raise SystemExit(main())
