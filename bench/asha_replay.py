"""What early stopping saves and what it costs: recorded learning curves replayed through the search's own scheduler.

    python -m bench.asha_replay --json replay.json             # bench/data/curves.json, by bench.record_curves
    python -m bench.asha_replay --decisions                    # decisions a second, and memory, with 500 trials

Every configuration of the recording was trained to its end, so a replay knows what a search would have found had it
waited. A replay shuffles the configurations, starts them as a search does (studies in turn, the next one whenever a
worker is free) and lets one of these say which go on:

- stratified ASHA: `tune.ray_backend.scheduler.StratifiedAsha` itself, as `tune.search` uses it; each study has
  its own rungs;
- plain ASHA, mixed: the same class told that all trials are one study, so that bit-widths share the rungs;
- random search: as many trials, each in full, as a quarter of the full budget pays;
- all in full: the budget that shares are of.

Regret: the final score of the best configuration recorded in the study, minus that of the configuration that the
search chooses (longest trained, then best score at its last epoch), also as it ends when trained in full. Survivors:
trials that reach the last epoch; a study without any is eliminated, its choice is one that was stopped. A trial that
diverges stops, is charged the epoch in which it does, and would have ended with top-1 0.

The search chooses by the same holdout that regret is measured on, the noise of which is thus no part of the regret:
this measures what stopping early loses, not how well the winner does on images that nobody chose by.
"""

import gc
import itertools
import json
import math
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from bench import command
from bench.simulator import Curve, Found, Patience, Run, affordable, judge, simulate
from bench.timing import machine, scratch
from nulsq.errors import InputError, Parser, exit_on_input_error
from tune.ray_backend.scheduler import StratifiedAsha
from tune.space import rungs

STRATIFIED, MIXED, RANDOM, FULL = "stratified ASHA", "plain ASHA, mixed", "random search", "all in full"
REGRET, SHARE = 0.3, 0.25  # targets of the median: points, share of the full budget
MARKS = (100, 300, 500)  # trials after which --decisions looks
LONG, STUDIES = 90, 18  # epochs and studies of those trials


class Mixed:
    """Plain ASHA: every trial in the same rungs, whatever its study."""

    def __init__(self, asha: StratifiedAsha):
        self.asha = asha

    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        return self.asha.decide("all", key, epoch, score)


class Clocked:
    """Another scheduler, with its decisions counted and timed."""

    def __init__(self, asha: StratifiedAsha):
        self.asha, self.count, self.seconds = asha, 0, 0.0

    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        began = time.perf_counter()
        answer = self.asha.decide(study, key, epoch, score)
        self.seconds += time.perf_counter() - began
        self.count += 1
        return answer


# ---- replays


def load(path: Path, raw: bool = False) -> tuple[dict, list[Curve]]:
    """A recording: what it is of, and its curves, each cut before its first score that is no number; `raw`: those of
    the weights as they are, beside their average."""
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"--curves: no file {path}; python -m bench.record_curves makes one") from None
    except ValueError as error:
        raise InputError(f"--curves: {path} is no JSON: {error}") from None
    metric = recorded.get("metric") if isinstance(recorded, dict) else None
    if metric != "val_top1":
        raise InputError(f"--curves: {path} has metric {metric}, allowed: val_top1 (regret is in its points)")
    trials = recorded.pop("trials")
    if raw and not any("raw" in trial for trial in trials):
        raise InputError(f"--raw: {path} has one score an epoch (it was recorded without optim.ema_decay)")
    epochs = [trial["seconds"] / len(trial["curve"]) for trial in trials if trial["curve"]]
    curves = []
    for trial in trials:
        scores = itertools.takewhile(lambda score: score is not None and math.isfinite(score),
                                     trial.get("raw", []) if raw else trial["curve"])
        # one that diverged in its first epoch has no line to take the time from
        seconds = trial["seconds"] / len(trial["curve"]) if trial["curve"] else float(np.mean(epochs))
        curves.append(Curve(trial["study"], trial["number"], tuple(scores), seconds))
    return recorded, curves


def shuffled(curves: list[Curve], seed: int, replay: int) -> list[Curve]:
    """The order of start in one replay: configurations at random, and of each its studies in turn."""
    studies = list(dict.fromkeys(curve.study for curve in curves))
    places = {number: place for place, number in enumerate(
        np.random.default_rng([seed, replay]).permutation(sorted({curve.number for curve in curves})).tolist())}
    return sorted(curves, key=lambda curve: (places[curve.number], studies.index(curve.study)))


def searches(curves: list[Curve], epochs: int, arguments) -> dict[str, Callable[[list[Curve]], list[Run]]]:
    """Name -> a search of the curves in their order of start."""
    studies = list(dict.fromkeys(curve.study for curve in curves))

    def asha(names):
        return StratifiedAsha(dict.fromkeys(names, epochs), grace=arguments.grace, reduction=arguments.reduction,
                              metric="val_top1", mode="max", file=None)

    def random(order):
        own = [[curve for curve in order if curve.study == study] for study in studies]
        paid = {curve.key for each in own for curve in affordable(each, epochs, SHARE * epochs * len(each))}
        return simulate([curve for curve in order if curve.key in paid], Patience(), epochs, arguments.workers)

    return {STRATIFIED: lambda order: simulate(order, asha(studies), epochs, arguments.workers),
            MIXED: lambda order: simulate(order, Mixed(asha(["all"])), epochs, arguments.workers),
            RANDOM: random,
            FULL: lambda order: simulate(order, Patience(), epochs, arguments.workers)}


def replay(curves: list[Curve], epochs: int, arguments) -> dict[str, dict[str, list[Found]]]:
    """Search -> study -> what each replay found."""
    studies = {study: [curve for curve in curves if curve.study == study] for study in
               dict.fromkeys(curve.study for curve in curves)}
    found = {}
    for name, search in searches(curves, epochs, arguments).items():
        every = [search(shuffled(curves, arguments.seed, number)) for number in range(arguments.replays)]
        found[name] = {study: [judge([run for run in runs if run.curve.study == study], own, epochs) for runs in every]
                       for study, own in studies.items()}
    return found


def row(study: str, search: str, found: list[Found]) -> dict:
    """One line of the table, with every replay's numbers; `met` is None where nothing is promised."""
    regrets, shares, survivors = ([getattr(each, name) for each in found] for name in ("regret", "share", "survivors"))
    regret, share = float(np.median(regrets)), float(np.median(shares))
    promised = search == STRATIFIED
    return {"study": study, "search": search, "regret": round(regret, 4),
            "regret_90": round(float(np.percentile(regrets, 90)), 4), "share": round(share, 4),
            "share_90": round(float(np.percentile(shares, 90)), 4), "survivors": float(np.median(survivors)),
            "eliminated": round(survivors.count(0) / len(survivors), 4),
            "met": {"regret": regret <= REGRET, "share": share <= SHARE} if promised else None,
            "replays": {"regret": [round(each, 4) for each in regrets], "share": [round(each, 4) for each in shares],
                        "survivors": survivors}}


def table(rows: list[dict]) -> str:
    """The rows as Markdown, then what was promised of them."""
    lines = ["| study | search | median regret | 90th percentile | share of the budget | survivors | eliminated in |",
             "|---" * 7 + "|"]
    for each in rows:
        lines.append(f"| {each['study']} | {each['search']} | {each['regret']:.2f} | {each['regret_90']:.2f} | "
                     f"{each['share']:.3f} | {each['survivors']:g} | {100 * each['eliminated']:.0f} % |")
    lines += ["", "| target, of stratified ASHA, at the median | study | found | |", "|---" * 4 + "|"]
    for name, target, unit in (("regret", REGRET, " points"), ("share", SHARE, " of the full budget")):
        for each in rows:
            if each["met"] is not None:
                met = "met" if each["met"][name] else "missed"
                lines.append(f"| {name} <= {target:g}{unit} | {each['study']} | {each[name]:.3f} | {met} |")
    return "\n".join(lines)


def described(curves: list[Curve], epochs: int, milestones: Iterable[int] = ()) -> list[dict]:
    """Per study: how many configurations, how many diverge, and how hard the best one is to find: how near others come,
    and what scores at milestones say of the end, as Spearman's rank correlation over those that do not diverge."""
    found = []
    for study in dict.fromkeys(curve.study for curve in curves):
        own = [curve for curve in curves if curve.study == study]
        finals = [curve.final(epochs) for curve in own]
        ranks = pd.DataFrame([curve.scores for curve in own if len(curve.scores) == epochs]).rank()
        found.append({"study": study, "configurations": len(own), "best": max(finals),
                      "median": float(np.median(finals)), "near": sum(max(finals) - each <= REGRET for each in finals),
                      "agreement": {epoch: round(float(ranks[epoch - 1].corr(ranks[epochs - 1])), 3)
                                    for epoch in milestones},
                      "diverge": sum(len(curve.scores) < epochs for curve in own)})
    return found


def heading(recorded: dict, studies: list[dict], arguments) -> str:
    """What was replayed, in words."""
    images = f"{recorded['subset']} training images" if recorded.get("subset") else "all training images"
    lines = [f"Replayed: {recorded['metric']} on the holdout ({recorded['holdout']}) of {recorded['model']}, "
             f"{recorded['epochs']} epochs of {images}, {recorded['recipe']} with {recorded.get('overrides', {})}.",
             f"{arguments.replays} replays, {arguments.workers} workers, grace {arguments.grace}, reduction "
             f"{arguments.reduction}, seed {arguments.seed}."]
    lines += [f"Study {each['study']}: {each['configurations']} configurations end at {each['best']:.2f} at best and "
              f"{each['median']:.2f} at the median; {each['near']} within {REGRET:g} points of the best, "
              f"{each['diverge']} diverge. Rank correlation with the end: "
              + ", ".join(f"{rho:.2f} after epoch {epoch}" for epoch, rho in each["agreement"].items()) + "."
              for each in studies]
    return "\n".join(lines)


# ---- decisions a second


def random_curves(seed: int) -> list[Curve]:
    """Curves that rise to a random height at a random pace, with noise; studies in turn."""
    draw = np.random.default_rng(seed)
    curves = []
    for number in range(max(MARKS)):
        height, pace = draw.uniform(40, 90), draw.uniform(2, 20)
        scores = height * (1 - np.exp(-np.arange(1, LONG + 1) / pace)) + draw.normal(0, 0.5, LONG)
        curves.append(Curve(f"study{number % STUDIES}", number // STUDIES, tuple(scores.tolist()),
                            float(draw.uniform(0.7, 1.4))))
    return curves


def decisions(curves: list[Curve], arguments, folder: Path | None) -> list[dict]:
    """Decisions a second, then, run again, the scheduler's memory; with `folder` the rungs are written there."""
    rows = [{"rungs": "in memory" if folder is None else "on disk", "trials": mark} for mark in MARKS]
    for traced in (False, True):  # tracing slows down what it traces
        file = None if folder is None else folder / f"rungs-{traced}"
        if traced:
            gc.collect()
            tracemalloc.start()
        asha = StratifiedAsha(dict.fromkeys([curve.study for curve in curves], LONG), grace=arguments.grace,
                              reduction=arguments.reduction, metric="val_top1", mode="max", file=file)
        for each, (low, high) in zip(rows, itertools.pairwise((0, *MARKS)), strict=True):
            clocked = Clocked(asha)
            simulate(curves[low:high], clocked, LONG, arguments.workers)
            if traced:
                gc.collect()
                each["kibibytes"] = round(tracemalloc.get_traced_memory()[0] / 1024, 1)
            else:
                each |= {"decisions": clocked.count, "per_second": round(clocked.count / clocked.seconds),
                         "file_kibibytes": round(file.stat().st_size / 1024, 1) if file else 0.0}
    tracemalloc.stop()
    return rows


def decisions_table(rows: list[dict]) -> str:
    lines = ["| rungs | after trials | decisions since | decisions a second | scheduler, KiB | file, KiB |",
             "|---" * 6 + "|"]
    lines += [f"| {each['rungs']} | {each['trials']} | {each['decisions']} | {each['per_second']} | "
              f"{each['kibibytes']:.0f} | {each['file_kibibytes']:.0f} |" for each in rows]
    return "\n".join(lines)


# ---- the command


def parser() -> Parser:
    made = Parser(prog="python -m bench.asha_replay", description=__doc__)
    made.add_argument("--curves", type=Path, default=Path("bench/data/curves.json"), help="recording (%(default)s)")
    made.add_argument("--raw", action="store_true", help="scores of the weights as they are, not of their average")
    made.add_argument("--replays", type=int, default=200, help="(%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the order of configurations (%(default)s)")
    made.add_argument("--workers", type=int, default=8, help="trials at a time (%(default)s)")
    made.add_argument("--reduction", type=int, default=4,
                      help="1 of so many goes on at a rung (%(default)s, Ray's own)")
    made.add_argument("--grace", type=int, default=1, help="first rung, in epochs (%(default)s)")
    made.add_argument("--decisions", action="store_true",
                      help="instead: speed and memory of the scheduler, in minutes")
    made.add_argument("--json", type=Path, help="write everything to this file")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    for name, low in (("replays", 1), ("seed", 0), ("workers", 1), ("reduction", 2), ("grace", 1)):
        if getattr(arguments, name) < low:
            raise InputError(f"--{name} {getattr(arguments, name)}, allowed: {low} and more")
    print(machine())
    written = {"command": command("bench.asha_replay", argv), "machine": machine()}
    if arguments.decisions:
        curves = random_curves(arguments.seed)
        with scratch("nulsq-rungs-") as folder:
            rows = decisions(curves, arguments, None) + decisions(curves, arguments, folder)
        print(f"{len(curves)} trials in {STUDIES} studies, {LONG} epochs, random curves\n\n{decisions_table(rows)}")
    else:
        recorded, curves = load(arguments.curves, arguments.raw)
        epochs = recorded["epochs"]
        if arguments.grace >= epochs:
            raise InputError(f"--grace {arguments.grace}, allowed: below the {epochs} epochs of a trial")
        studies = described(curves, epochs, rungs(epochs, arguments.grace, arguments.reduction))
        found = replay(curves, epochs, arguments)
        rows = [row(each["study"], name, found[name][each["study"]]) for each in studies for name in found]
        print(f"{heading(recorded, studies, arguments)}\n\n{table(rows)}")
        written |= {"replayed": recorded | {"studies": studies}, "settings": {
            name: getattr(arguments, name) for name in ("replays", "seed", "workers", "reduction", "grace")}}
    if arguments.json:
        head = json.dumps(written, indent=1).removesuffix("\n}")
        lines = ",\n".join(json.dumps(each) for each in rows)  # one a line, as the other measurements write them
        arguments.json.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
