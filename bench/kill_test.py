"""Kill a run repeatedly, and compare its final state with that of an uninterrupted run.

    python -m bench.kill_test --kills 20 --json kills.json

Two ranks under torchrun train a quantized network on the digits, with a checkpoint every few steps, averaged weights,
tracked oscillations and batch norm per rank (so running statistics differ between ranks). All processes get SIGKILL at
a random moment and the run is started again, until the number of kills is reached. If a run finishes earlier, another
one is started. The kills aim in turn at any moment, the evaluation on the holdout, and the writing of a checkpoint.
Finally the weights, quantizer parameters, optimizers, metrics and test accuracy of every run have to equal those of
the uninterrupted one bit for bit. Exit code 0: they are equal; 1: they differ.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.timing import report, scratch
from data_prep import digits
from launch.local import torchrun
from nulsq.config import Recipe, load, to_yaml
from nulsq.distributed import Ranks
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.evaluate import evaluate_run
from nulsq.files import UNFINISHED
from nulsq.run import checkpoint
from nulsq.run.directory import TIMES, path_of, read_metrics

AIMS = ("any moment", "evaluation", "save")
SETTINGS = {"run.threads": 1, "run.device": "cpu", "run.save_every": 2, "data.batch": 32, "data.subset": 256,
            "data.holdout": "stratified:0.4", "data.crop": "pad", "data.padding": 2, "optim.epochs": 4,
            "optim.lr": 0.02, "optim.ema_decay": 0.9, "oscillation.freeze_threshold": 0.1,
            "quant.calibration_batches": 2}
TIMEOUT = 600.0  # seconds from one start to the next checkpoint or the end


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are bit-identical, apart from the recorded times."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def result(run: Path) -> tuple[Any, ...]:
    """The results of a finished run that are compared: final state, metrics, test accuracy."""
    return (checkpoint.load_chosen(run, "last"), read_metrics(run),
            json.loads((run / "test.json").read_text()))


def start(file: Path) -> subprocess.Popen:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*torchrun(2), "nulsq.train", str(file)], env=environment, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=(file.parent / "stderr.txt").open("a"))


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to torchrun and its ranks, by process id because each rank has its own session."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.wait()


def phase_of(run: Path, steps: int) -> str:
    """The phase in which a run was killed, according to its files."""
    folder = run / checkpoint.FOLDER
    if not folder.is_dir():
        return "start"
    if any(path.name.endswith(UNFINISHED) for path in folder.iterdir()):
        return "save"
    if not checkpoint.files(run):
        return "start"
    content = checkpoint.load_chosen(run, "last")
    return "evaluation" if content["step"] == (content["epoch"] + 1) * steps else "training"


def wait(process: subprocess.Popen, run: Path, aim: str, generator: random.Random, steps: int) -> bool:
    """Wait for the moment to kill, which is after the first new checkpoint; False if the process ended before."""
    start_time, seen = time.monotonic(), {path.name for path in checkpoint.files(run)}
    folder, delay, armed = run / checkpoint.FOLDER, generator.uniform(0, 3.0), None
    while process.poll() is None:
        if time.monotonic() - start_time > TIMEOUT:
            kill(process)
            raise InputError(f"a run wrote no checkpoint for {TIMEOUT:.0f} seconds; see stderr.txt next to {run}")
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        new = {name for name in names if name.endswith(".pt")} - seen
        if armed is None and new:
            armed = time.monotonic()
        if armed is not None:
            waited = time.monotonic() - armed >= delay
            evaluating = any(step == (epoch + 1) * steps for step, epoch in map(_position, new))
            if {"any moment": waited, "evaluation": evaluating,
                    "save": any(name.endswith(UNFINISHED) for name in names) and waited}[aim]:
                return True
        time.sleep(0.0005)
    return False


def _position(name: str) -> tuple[int, int]:
    """Step and epoch of a checkpoint's file name."""
    _, step, _, epoch = name.removesuffix(".pt").split("-")
    return int(step), int(epoch)


def campaign(folder: Path, kills: int, seed: int, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Kill runs in `folder` at least `kills` times; returns counts and whether all runs ended identically."""
    data = digits.prepare(folder / "digits")
    recipe = load(Recipe, "configs/recipes/digits/w2a2.yaml",
                  SETTINGS | {"name": "straight", "run.root": str(folder), "data.path": str(data),
                              "model.init_from": None})
    assert recipe.data.subset is not None
    steps = recipe.data.subset // recipe.data.batch

    def run_named(name: str) -> tuple[Path, Path]:
        """Write the recipe file of a run; returns it and the run directory."""
        copy = dataclasses.replace(recipe, name=name)
        file = folder / f"{name}.yaml"
        file.write_text(to_yaml(copy))
        return file, path_of(copy)

    def evaluated(run: Path) -> tuple[Any, ...]:
        evaluate_run(run, ranks=Ranks(0, 1, torch.device("cpu")))  # into test.json
        return result(run)

    file, uninterrupted = run_named("straight")
    start_time = time.monotonic()
    if code := start(file).wait(timeout=TIMEOUT):
        raise InputError(f"the uninterrupted run ended with {code}; see {folder}/stderr.txt")
    log(f"uninterrupted: {time.monotonic() - start_time:.0f} s")
    expected, generator = evaluated(uninterrupted), random.Random(seed)
    moments: dict[str, int] = {}
    runs, done, identical = 0, 0, True
    while done < kills or not runs:
        file, run = run_named(f"killed-{runs}")
        while True:
            process = start(file)
            if done < kills and wait(process, run, AIMS[done % len(AIMS)], generator, steps):
                kill(process)
                phase = phase_of(run, steps)
                moments[phase] = moments.get(phase, 0) + 1
                done += 1
                log(f"kill {done} of {kills}, run {runs}: aimed at {AIMS[(done - 1) % len(AIMS)]}, was at {phase}")
                continue
            code = process.wait(timeout=TIMEOUT)
            if code:
                raise InputError(f"run {runs} was not killed and ended with {code}; see {folder}/stderr.txt")
            break
        equal = same(evaluated(run), expected)
        identical &= equal
        runs += 1
        log(f"run {runs - 1} finished, {'identical' if equal else 'DIFFERENT'}")
    return {"kills": done, "runs": runs, "moments": moments, "identical": identical, "seed": seed,
            "seconds": round(time.monotonic() - start_time, 1)}


def parser() -> Parser:
    parser = Parser(prog="python -m bench.kill_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="minimum number of kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (%(default)s)")
    parser.add_argument("--dir", type=Path, help="keep the runs here; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write what happened to this file")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.kills < 1:
        raise InputError(f"--kills {arguments.kills}, allowed: 1 and more")
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with scratch("kill-test-") if arguments.dir is None else contextlib.nullcontext(arguments.dir) as folder:
        outcome = campaign(folder, arguments.kills, arguments.seed, lambda text: print(text, flush=True))
    report(outcome, arguments.json)
    return 0 if outcome["identical"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
