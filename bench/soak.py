"""Many short epochs in one process: memory, threads and open files stay as they are.

    python -m bench.soak --epochs 200 --json soak.json

A quantized run on the digits, one step an epoch, through the FFCV loader where ffcv is installed, with evaluation,
checkpoint and report after each. Compared are the medians of the second tenth of the epochs and of the last. Exit code
0: flat, 1: something grew.
"""

import importlib.util
import os
import statistics
import threading
from pathlib import Path

from bench.timing import report, scratch
from data_prep import digits
from nulsq.config import load_recipe
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.train import train
from nulsq.training.memory import resident_bytes

SLACK = {"megabytes": 16.0, "threads": 0, "files": 0}


def soak(folder: Path, epochs: int) -> dict:
    """What was counted at the two ends, and whether it is flat."""
    data = digits.prepare(folder / "digits")
    kind = "ffcv" if importlib.util.find_spec("ffcv") else "torchvision"
    recipe = load_recipe("configs/recipes/digits/w2a2.yaml", {
        "name": "soak", "run.root": str(folder), "data.path": str(data), "data.loader": kind, "data.batch": 32,
        "data.subset": 32, "data.holdout": "stratified:0.05", "model.init_from": None, "run.device": "cpu",
        "run.threads": 1, "optim.epochs": epochs, "quant.calibration_batches": 1})
    seen = []

    def look(metrics, _):
        seen.append({"megabytes": resident_bytes() / 2**20, "threads": threading.active_count(),
                     "files": len(os.listdir("/proc/self/fd"))})

    train(recipe, report=look, quiet=True)
    tenth = epochs // 10
    ends = [{key: statistics.median(each[key] for each in part) for key in SLACK}
            for part in (seen[tenth:2 * tenth], seen[-tenth:])]
    return {"epochs": epochs, "loader": kind, "early": ends[0], "late": ends[1],
            "flat": all(ends[1][key] - ends[0][key] <= slack for key, slack in SLACK.items())}


def parser() -> Parser:
    made = Parser(prog="python -m bench.soak", description=__doc__)
    made.add_argument("--epochs", type=int, default=200, help="(%(default)s)")
    made.add_argument("--json", type=Path, help="write what was counted to this file")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.epochs < 20:
        raise InputError(f"--epochs {arguments.epochs}, allowed: 20 and more")
    with scratch("soak-") as folder:
        found = soak(folder, arguments.epochs)
    report(found, arguments.json)
    return 0 if found["flat"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
