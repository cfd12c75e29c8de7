"""Record the learning curve of every trial of a search without early stopping, for bench.asha_replay.

    python -m bench.record_curves                                      # an hour on two cores, in two processes
    python -m bench.record_curves --search configs/search/curves.yaml --processes 2 --json bench/data/curves.json

`nulsq.train` trains the float network that the trials start from, then every trial to its end, in runs/curves. Scores
are those on the holdout. After an interruption the same command continues. Needs data/cifar10
(python -m data_prep cifar10 --out data/cifar10).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nulsq.config import load_recipe
from nulsq.errors import Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import RunStatus, read_status
from nulsq.train import train
from tune.queue import all_trials
from tune.space import Search, Trial, load_search


def parser() -> Parser:
    parser = Parser(prog="python -m bench.record_curves", description=__doc__)
    parser.add_argument("--search", type=Path, default=Path("configs/search/curves.yaml"),
                        help="search file (%(default)s)")
    parser.add_argument("--start", type=Path, default=Path("configs/recipes/cifar10/tiny_float.yaml"),
                        help="recipe of the network that trials start from (%(default)s)")
    parser.add_argument("--processes", type=int, default=2,
                        help="trials at a time, with one thread each (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"),
                        help="folder of the run directories (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("bench/data/curves.json"),
                        help="file to write (%(default)s)")
    parser.add_argument("--share", metavar="I/N",
                        help="train every N-th trial from the I-th on: how this command calls its processes")
    return parser


def train_share(search: Search, runs: Path, trials: list[Trial]) -> None:
    """Train each trial to its end, or continue it; finished ones are skipped."""
    for trial in trials:
        own = {"run.dir": str(runs / trial.key), "run.threads": 1, "run.device": "cpu"}
        recipe = load_recipe(search.recipe, search.overrides | trial.overrides | own)
        if read_status(path_of(recipe)) not in (RunStatus.FINISHED, RunStatus.DIVERGED):
            state = train(recipe, quiet=True)
            print(f"{trial.key} {state.status} {(state.best or {}).get(search.metric)}", flush=True)
            for file in (runs / trial.key / "checkpoints").glob("*.pt"):
                file.unlink()


def curves(search: Search, runs: Path) -> dict[str, Any]:
    """The content of the JSON file: the search's settings, and each trial's hyperparameters and scores by epoch."""
    trials = []
    for trial in all_trials(search):
        lines = read_metrics(runs / trial.key)
        raw = f"raw_{search.metric}"  # of the weights themselves, in runs that score their average
        trials.append({"study": trial.study, "number": trial.number, "drawn": trial.drawn,
                      "curve": [line[search.metric] for line in lines],
                      **({"raw": [line[raw] for line in lines]} if any(raw in line for line in lines) else {}),
                      "seconds": round(sum(line["seconds"] for line in lines), 1)})
    recipe = load_recipe(search.recipe, search.overrides)
    return {"metric": search.metric, "epochs": recipe.optim.epochs, "recipe": search.recipe,
            "overrides": search.overrides, "model": recipe.model.name,
            "holdout": recipe.data.holdout, "subset": recipe.data.subset, "trials": trials}


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    search = load_search(arguments.search)
    if arguments.share:
        index, count = map(int, arguments.share.split("/"))
        train_share(search, arguments.runs, all_trials(search)[index::count])
        return 0
    start = load_recipe(arguments.start)
    if read_status(path_of(start)) is not RunStatus.FINISHED:
        train(start)
    command = [sys.executable, "-m", "bench.record_curves", *argv]
    processes = [subprocess.Popen([*command, "--share", f"{index}/{arguments.processes}"])
                 for index in range(arguments.processes)]
    codes = [process.wait() for process in processes]
    if any(codes):
        return 1
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.json, json.dumps(curves(search, arguments.runs), indent=1) + "\n")
    print(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
