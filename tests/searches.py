"""Search folders with simulated curves, written by the project's own functions, for tests that read them; and functions
that tests of real searches share."""

import functools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nulsq.config import Recipe, load, to_yaml
from nulsq.files import write_atomically
from nulsq.run.directory import METRICS, RunDirectory, read_metrics
from nulsq.run.provenance import describe_code
from nulsq.run.status import RunStatus, write_status
from tune.space import Axis, Sampler, Search, Trial, rungs, studies
from tune.store import journal

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, GRACE, REDUCTION = 9, 1, 3
SPACE = {"lr": Sampler("optim.lr", "loguniform", 0.001, 0.3),
         "coeff_qparm_lr": Sampler("optim.coeff_qparm_lr", "loguniform", 0.001, 0.3),
         "qparm_wd": Sampler("optim.qparm_wd", "loguniform", 1e-5, 1e-2)}
MARKUP = "<b>bold</b>"


def write_search(folder: Path, axes: dict[str, list], trials: int, finalists: int = 2, repeats: int = 2,
                 name: str = "made") -> Search:
    """Write the folder of a finished search, without Ray's files and the scores in the rungs.

    Scores rise with lr up to 0.03 and a little with coeff_qparm_lr; above lr = 0.12 trials diverge.
    """
    recipe = load(Recipe, None, {"name": "made", "data.path": "data/none", "optim.epochs": EPOCHS})
    search = Search(name=name, recipe=str(folder / "recipe.yaml"), space=SPACE, trials=trials, grace=GRACE,
                    reduction=REDUCTION, finalists=finalists, repeats=repeats, dir=str(folder),
                    studies={axis: Axis(key, values) for axis, (key, values) in axes.items()})
    folder.mkdir(parents=True)
    write_atomically(folder / "recipe.yaml", to_yaml(recipe))
    write_atomically(folder / "search.yaml", to_yaml(search))
    generator, code, stopped, rung_scores = random.Random(0), describe_code(), {}, {}
    drawn = [{sampler_name: sampler.quantile(generator.random()) for sampler_name, sampler in SPACE.items()}
             for _ in range(trials)]
    best: dict[str, list] = {study.name: [] for study in studies(search)}
    for number in range(trials):
        for i, study in enumerate(studies(search)):
            overrides = study.overrides | {SPACE[key].key: value for key, value in drawn[number].items()}
            trial = Trial(study.name, number, overrides, drawn[number], "point" if number == 0 else "random",
                          cost={"average_bits": 2.0 + 2 * i, "bytes": 70_000 + 65_000 * i})
            curve = simulated_curve(drawn[number], i, generator)
            if drawn[number]["lr"] > 0.12:
                write_run(folder, trial, [*curve[:2], math.nan], RunStatus.DIVERGED, code)
                continue
            for rung in rungs(EPOCHS, GRACE, REDUCTION):
                scores = rung_scores.setdefault((study.name, rung), [])
                scores.append(curve[rung - 1])
                if sum(score > curve[rung - 1] for score in scores) >= math.ceil(len(scores) / REDUCTION):
                    stopped[trial.key] = rung
                    break
            kept = curve[:stopped.get(trial.key, EPOCHS)]
            write_run(folder, trial, kept, RunStatus.RUNNING if trial.key in stopped else RunStatus.FINISHED, code)
            if trial.key not in stopped:
                best[study.name].append((curve[-1], trial, curve))
    for members in best.values():
        for _, first, curve in sorted(members, key=lambda entry: -entry[0])[:finalists]:
            for repeat in range(1, repeats + 1):
                trial = Trial(first.study, first.number, first.overrides | {"run.seed": repeat}, first.drawn, "repeat",
                              repeat, first.cost)
                scores = [score + generator.gauss(-0.3, 0.3) for score in curve]
                write_run(folder, trial, scores, RunStatus.FINISHED, code)
    (folder / "rungs").write_text(json.dumps({"rungs": {}, "stopped": stopped}))
    (folder / "lock").touch()
    (folder / "finished").touch()
    write_events(folder)
    return search


def simulated_curve(drawn: dict[str, float], study: int, generator: random.Random) -> list[float]:
    top = 78 + 8 * study - 5 * math.log10(drawn["lr"] / 0.03) ** 2 + 1.5 * math.log10(drawn["coeff_qparm_lr"] / 0.02)
    return [min(99.0, top - (top - 25) * math.exp(-epoch / 2.2) + generator.gauss(0, 0.4))
            for epoch in range(1, EPOCHS + 1)]


MARKS = {"optim.lr": 111.5, "optim.coeff_qparm_lr": 222.5, "optim.qparm_wd": 333.5, "run.seed": 4444444,
         "run.dir": "@run@"}


@functools.cache
def marked_recipe() -> str:
    return to_yaml(load(Recipe, None, MARKS | {"name": "made", "optim.epochs": EPOCHS}))


def recipe_text(overrides: dict[str, Any]) -> str:
    """A trial's recipe.yaml, by replacing marks: a call of `to_yaml` for each trial would take a fifth of a second."""
    text = marked_recipe()
    for key, mark in MARKS.items():
        text = text.replace(str(mark), str(overrides.get(key, 0)))
    return text


def write_run(folder: Path, trial: Trial, curve: list[float], status: RunStatus, code: str) -> None:
    journal.append(folder, trial)
    path = folder / "trials" / trial.key
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe_text(trial.overrides | {"run.dir": str(path)}))
    (path / "code.txt").write_text(code)
    run = RunDirectory(path)
    for epoch, score in enumerate(curve, 1):
        run.append(METRICS, {"epoch": epoch, "step": 10 * epoch, "val_top1": score, "val_loss": 4 - score / 30,
                             "train_loss": 4 - score / 29, "images_per_second": 900.0, "seconds": 20.0 + epoch / 10})
    write_status(path, status)


def write_events(folder: Path) -> None:
    """Write the events of two concurrent trials at a time, in two sessions with a night between them."""
    now, free, lines = 1.7e9, [0.0, 0.0], []
    for trial in journal.read(folder):
        seconds = sum(json.loads(line)["seconds"] for line in (folder / "trials" / trial.key / METRICS).open())
        lane = free.index(min(free))
        lines += [{"time": now + free[lane], "event": "start", "key": trial.key},
                  {"time": now + free[lane] + seconds, "event": "end", "key": trial.key}]
        free[lane] += seconds + 2
    lines.sort(key=lambda line: line["time"])
    half = lines[len(lines) // 2]["time"]
    lines = [line | {"time": line["time"] + 30_000 * (line["time"] >= half)} for line in lines]
    lines += [{"time": now - 5, "event": "session", "key": None},
              {"time": half + 30_000 - 5, "event": "session", "key": None}]
    (folder / journal.EVENTS).write_text("".join(json.dumps(line) + "\n" for line in
                                                 sorted(lines, key=lambda line: line["time"])))


def evaluation(top1: float) -> dict:
    return {"test_top1": top1, "test_images": 359, "checkpoint": "best", "epoch": 9, "step": 90,
            "start_saw_holdout": False}


def two_studies(folder: Path):
    """Findings of two studies of 24 trials and their finalists' repeats. The winners reached 77, 78, 79 % and 85, 86,
    87 % on test."""
    from tune.report.findings import Findings
    from tune.store.results import collect
    search = write_search(folder, {"bits": ("quant.bits", [2, 4])}, 24)
    findings = Findings(search, collect(search, journal.read(folder)), {})
    findings.tests = {study: [evaluation({"2": 77.0, "4": 85.0}[study] + i) for i in range(len(finalists[0].rows))]
                      for study, finalists in findings.finalists.items()}
    return findings


def marked_search(folder: Path) -> Search:
    """A search with markup in names and values, few trials, no repeats."""
    return write_search(folder, {"name": ("name", [MARKUP, "plain"])}, 4, finalists=1, repeats=0, name=MARKUP)


def search(*arguments: object, timeout: float = 1000) -> subprocess.CompletedProcess:
    """Run `python -m tune.search` without a GPU."""
    return subprocess.run([sys.executable, "-m", "tune.search", *map(str, arguments)], cwd=ROOT, timeout=timeout,
                          capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


class UnpicklableError(Exception):
    """Can be pickled but not unpickled, because `args` differs from the arguments of `__init__`."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def fail(one: str, other: str) -> None:
    raise UnpicklableError(one, other)


def linger(folder: str) -> None:
    """Sleep for a minute and keep a temporary file until the end; called in a subprocess."""
    file = Path(folder) / "unfinished"
    file.touch()
    try:
        time.sleep(60)
    finally:
        file.unlink()


def assert_each_result_once(out: Path) -> None:
    """Assert that the journal of a search has each epoch of each trial once."""
    results = [(event["key"], event["epoch"]) for event in journal.events(out) if event["event"] == "result"]
    trained = [(trial.key, line["epoch"]) for trial in journal.read(out)
               for line in read_metrics(out / "trials" / trial.key)]
    assert sorted(results) == sorted(trained)
