"""A run that is killed again and again ends with the numbers of one that was not.

    python -m bench.kill_test --kills 20 --json kills.json

Two ranks under torchrun train a quantized network on the digits, with a checkpoint every few steps, averaged weights,
tracked oscillations and batch norm of their own (running statistics differ between ranks). All processes get SIGKILL at
a random moment, the run is started again, until the kills are used up; a run that comes to its end before is followed
by another. Aimed at in turn: any moment, the evaluation on the holdout, and the writing of a checkpoint. In the end
weights, quantizer parameters, optimizers, metrics and test accuracy of every run must be those of the uninterrupted
one, bit for bit. Exit code 0: identical, 1: not.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import torch

from bench.timing import report, scratch
from data_prep import digits
from launch.local import torchrun
from nulsq.config import Recipe, load, to_yaml
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.files import UNFINISHED
from nulsq.run import checkpoint
from nulsq.run.directory import TIMES, path_of, read_metrics

AIMS = ("any moment", "evaluation", "save")
SETTINGS = {"run.threads": 1, "run.device": "cpu", "run.save_every": 2, "data.batch": 32, "data.subset": 256,
            "data.holdout": "stratified:0.4", "data.crop": "pad", "data.padding": 2, "optim.epochs": 4,
            "optim.lr": 0.02, "optim.ema_decay": 0.9, "oscillation.freeze_threshold": 0.1,
            "quant.calibration_batches": 2}
TIMEOUT = 600.0  # seconds that one start may take


def same(a, b) -> bool:
    """Equal bit for bit through dicts and lists, but for what the clock says."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def result(run: Path) -> tuple:
    """All that a finished run leaves but times: final state, metrics, test accuracy."""
    return (checkpoint.load_chosen(run, "last"), read_metrics(run),
            json.loads((run / "test.json").read_text()))


def start(file: Path) -> subprocess.Popen:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*torchrun(2), "nulsq.train", str(file)], env=environment, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=(file.parent / "stderr.txt").open("a"))


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and its ranks, which have sessions of their own, by their process ids."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.wait()


def moment(run: Path, steps: int) -> str:
    """What a killed run was at, as far as its files tell."""
    folder = run / checkpoint.FOLDER
    if not folder.is_dir():
        return "start"
    if any(path.name.endswith(UNFINISHED) for path in folder.iterdir()):
        return "save"
    if not checkpoint.files(run):
        return "start"
    content = checkpoint.load_chosen(run, "last")
    return "evaluation" if content["step"] == (content["epoch"] + 1) * steps else "training"


def wait(process: subprocess.Popen, run: Path, aim: str, draw: random.Random, steps: int) -> bool:
    """Until the moment to kill; whether the process still runs then. It has begun to train by then."""
    began, seen = time.monotonic(), {path.name for path in checkpoint.files(run)}
    folder, delay, armed = run / checkpoint.FOLDER, draw.uniform(0, 3.0), None
    while process.poll() is None:
        if time.monotonic() - began > TIMEOUT:
            kill(process)
            raise InputError(f"a run did not go on for {TIMEOUT:.0f} seconds; see stderr.txt beside {run}")
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


def _position(name):
    _, step, _, epoch = name.removesuffix(".pt").split("-")
    return int(step), int(epoch)


def campaign(folder: Path, kills: int, seed: int, say=print) -> dict:
    """Kill runs in `folder` so many times; what happened, and whether all ended identically."""
    data = digits.prepare(folder / "digits")
    recipe = load(Recipe, "configs/recipes/digits/w2a2.yaml",
                  SETTINGS | {"name": "straight", "run.root": str(folder), "data.path": str(data),
                              "model.init_from": None})
    steps = recipe.data.subset // recipe.data.batch

    def named(name):
        own = dataclasses.replace(recipe, name=name)
        file = folder / f"{name}.yaml"
        file.write_text(to_yaml(own))
        return file, path_of(own)

    file, straight = named("straight")
    began = time.monotonic()
    if code := start(file).wait(timeout=TIMEOUT):
        raise InputError(f"the uninterrupted run ended with {code}; see {folder}/stderr.txt")
    say(f"uninterrupted: {time.monotonic() - began:.0f} s")
    wanted, draw, moments, runs, done, identical = result(straight), random.Random(seed), {}, 0, 0, True
    while done < kills or not runs:
        file, run = named(f"killed-{runs}")
        while True:
            process = start(file)
            if done < kills and wait(process, run, AIMS[done % len(AIMS)], draw, steps):
                kill(process)
                at = moment(run, steps)
                moments[at] = moments.get(at, 0) + 1
                done += 1
                say(f"kill {done} of {kills}, run {runs}: aimed at {AIMS[(done - 1) % len(AIMS)]}, was at {at}")
                continue
            code = process.wait(timeout=TIMEOUT)
            if code:
                raise InputError(f"run {runs} ended with {code} by itself; see {folder}/stderr.txt")
            break
        equal = same(result(run), wanted)
        identical &= equal
        runs += 1
        say(f"run {runs - 1} came to its end, {'identical' if equal else 'DIFFERENT'}")
    return {"kills": done, "runs": runs, "moments": moments, "identical": identical, "seed": seed,
            "seconds": round(time.monotonic() - began, 1)}


def parser() -> Parser:
    made = Parser(prog="python -m bench.kill_test", description=__doc__)
    made.add_argument("--kills", type=int, default=20, help="at least so many (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    made.add_argument("--dir", type=Path, help="keep the runs here; default: a temporary folder")
    made.add_argument("--json", type=Path, help="write what happened to this file")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.kills < 1:
        raise InputError(f"--kills {arguments.kills}, allowed: 1 and more")
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with scratch("kill-test-") if arguments.dir is None else contextlib.nullcontext(arguments.dir) as folder:
        found = campaign(folder, arguments.kills, arguments.seed, lambda text: print(text, flush=True))
    report(found, arguments.json)
    return 0 if found["identical"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
