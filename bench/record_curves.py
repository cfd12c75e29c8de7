"""Learning curves of every trial of a search, none stopped early: what bench.asha_replay replays.

    python -m bench.record_curves                                      # an hour on two cores, in two processes
    python -m bench.record_curves --search configs/search/curves.yaml --processes 2 --json bench/data/curves.json

Trains the float network that the trials start from, then every trial to its end with `nulsq.train`, in runs/curves.
Interrupted at any point, the same command goes on. Needs data/cifar10 (python -m data_prep cifar10 --out data/cifar10).
"""

import json
import subprocess
import sys
from pathlib import Path

from nulsq.config import load_recipe
from nulsq.errors import Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import RunStatus, read_status
from nulsq.train import train
from tune.queue import all_trials
from tune.space import Search, Trial, load_search


def parser() -> Parser:
    made = Parser(prog="python -m bench.record_curves", description=__doc__)
    made.add_argument("--search", type=Path, default=Path("configs/search/curves.yaml"), help="(%(default)s)")
    made.add_argument("--start", type=Path, default=Path("configs/recipes/cifar10/tiny_float.yaml"),
                      help="recipe of the network that trials start from (%(default)s)")
    made.add_argument("--processes", type=int, default=2, help="trials at a time, one thread each (%(default)s)")
    made.add_argument("--runs", type=Path, default=Path("runs/curves"), help="where trials are trained (%(default)s)")
    made.add_argument("--json", type=Path, default=Path("bench/data/curves.json"), help="(%(default)s)")
    made.add_argument("--share", metavar="I/N", help="train every N-th trial, from the I-th: what each process is told")
    return made


def train_share(search: Search, runs: Path, every: list[Trial]) -> None:
    """Train each trial from where its run directory stands; what is finished costs nothing."""
    for trial in every:
        own = {"run.dir": str(runs / trial.key), "run.threads": 1, "run.device": "cpu"}
        recipe = load_recipe(search.recipe, search.overrides | trial.overrides | own)
        if read_status(path_of(recipe)) not in (RunStatus.FINISHED, RunStatus.DIVERGED):
            state = train(recipe, quiet=True)
            print(f"{trial.key} {state.status} {(state.best or {}).get(search.metric)}", flush=True)
            for file in (runs / trial.key / "checkpoints").glob("*.pt"):
                file.unlink()


def curves(search: Search, runs: Path) -> dict:
    """The content of the JSON file: the search's settings, and of every trial its draw and its score by epoch."""
    found = []
    for trial in all_trials(search):
        lines = read_metrics(runs / trial.key)
        raw = f"raw_{search.metric}"  # of the weights as they are, where their average is what counts
        found.append({"study": trial.study, "number": trial.number, "drawn": trial.drawn,
                      "curve": [line[search.metric] for line in lines],
                      **({"raw": [line[raw] for line in lines]} if any(raw in line for line in lines) else {}),
                      "seconds": round(sum(line["seconds"] for line in lines), 1)})
    recipe = load_recipe(search.recipe, search.overrides)
    return {"metric": search.metric, "epochs": recipe.optim.epochs, "recipe": search.recipe,
            "overrides": search.overrides, "model": recipe.model.name,
            "holdout": recipe.data.holdout, "subset": recipe.data.subset, "trials": found}


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    search = load_search(arguments.search)
    every = all_trials(search)
    if arguments.share:
        mine, of = map(int, arguments.share.split("/"))
        train_share(search, arguments.runs, every[mine::of])
        return 0
    start = load_recipe(arguments.start)
    if read_status(path_of(start)) is not RunStatus.FINISHED:
        train(start)
    own = [sys.executable, "-m", "bench.record_curves", *argv]
    started = [subprocess.Popen([*own, "--share", f"{each}/{arguments.processes}"])
               for each in range(arguments.processes)]
    codes = [process.wait() for process in started]
    if any(codes):
        return 1
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps(curves(search, arguments.runs), indent=1) + "\n")
    print(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
