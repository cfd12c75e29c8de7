"""Train many short epochs in one process, and check that memory, threads and open files do not grow.

    python -m bench.soak --epochs 200 --json soak.json

A quantized run on the digits with one step per epoch, followed by evaluation, checkpoint and report. It uses the FFCV
loader if ffcv is installed. The medians over the second tenth of the epochs and over the last tenth are compared. Exit
code 0: nothing grew; 1: something did.
"""

import importlib.util
import os
import statistics
import threading
from pathlib import Path
from typing import Any

from bench.timing import report, scratch
from data_prep import digits
from nulsq.config import load_recipe
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.train import train
from nulsq.training.memory import resident_bytes

SLACK = {"megabytes": 16.0, "threads": 0, "files": 0}  # growth that is allowed


def soak(folder: Path, epochs: int) -> dict[str, Any]:
    """Medians of both ends of the run ("early", "late"), and whether nothing grew ("flat")."""
    data = digits.prepare(folder / "digits")
    loader_name = "ffcv" if importlib.util.find_spec("ffcv") else "torchvision"
    recipe = load_recipe("configs/recipes/digits/w2a2.yaml", {
        "name": "soak", "run.root": str(folder), "data.path": str(data), "data.loader": loader_name, "data.batch": 32,
        "data.subset": 32, "data.holdout": "stratified:0.05", "model.init_from": None, "run.device": "cpu",
        "run.threads": 1, "optim.epochs": epochs, "quant.calibration_batches": 1})
    samples: list[dict[str, float]] = []

    def sample(*_: Any) -> None:
        samples.append({"megabytes": resident_bytes() / 2**20, "threads": threading.active_count(),
                        "files": len(os.listdir("/proc/self/fd"))})

    train(recipe, report=sample, quiet=True)
    tenth = epochs // 10
    early, late = ({key: statistics.median(values[key] for values in part) for key in SLACK}
                   for part in (samples[tenth:2 * tenth], samples[-tenth:]))
    return {"epochs": epochs, "loader": loader_name, "early": early, "late": late,
            "flat": all(late[key] - early[key] <= slack for key, slack in SLACK.items())}


def parser() -> Parser:
    parser = Parser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--epochs", type=int, default=200, help="at least 20 (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.epochs < 20:
        raise InputError(f"--epochs {arguments.epochs}, allowed: 20 and more")
    with scratch("soak-") as folder:
        result = soak(folder, arguments.epochs)
    report(result, arguments.json)
    return 0 if result["flat"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
