"""What early stopping saves and what it costs: recorded learning curves replayed through the search's own scheduler.

    python -m bench.asha_replay --json replay.json             # bench/data/curves.json, by bench.record_curves
    python -m bench.asha_replay --decisions                    # decisions per second, and memory, with 500 trials

Every configuration of the recording was trained to its end, so a replay knows what a search without early stopping
would have found. A replay shuffles the configurations and starts them as a search does (studies in turn, the next one
whenever a worker is free). One of these decides which trials continue:

- stratified ASHA: `tune.ray_backend.scheduler.StratifiedAsha`, the class of `tune.search`: each study has its rungs;
- plain ASHA, mixed: the same class with all trials in one study, so that bit-widths share the rungs;
- random search: as many complete trials as a quarter of the full budget allows;
- all in full: the full budget.

Regret: the final score of the best configuration recorded in the study, minus that of the configuration that the
search chooses (longest trained, then best score at its last epoch), both trained in full. Survivors: trials that reach
the last epoch. A study without survivors is eliminated, and its choice is a stopped trial. A trial that diverges stops,
costs the epoch in which it diverges, and has a final top-1 of 0.

Search and regret use the same holdout, so regret measures what early stopping loses, and not how well the winner does
on new images.
"""

import argparse
import gc
import itertools
import json
import math
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import command
from bench.simulator import Curve, NoStopping, Run, StudyResult, affordable, judge, simulate
from bench.timing import machine, scratch
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.text import markdown_table
from tune.ray_backend.scheduler import StratifiedAsha
from tune.space import rungs

STRATIFIED, MIXED, RANDOM, FULL = "stratified ASHA", "plain ASHA, mixed", "random search", "all in full"
REGRET, SHARE = 0.3, 0.25  # targets of the median: points, share of the full budget
MARKS = (100, 300, 500)  # numbers of trials after which --decisions measures
LONG, STUDIES = 90, 18  # epochs and studies of those trials
Search = Callable[[list[Curve]], list[Run]]  # simulates a search for curves in their order of start


class SharedRungs:
    """Plain ASHA: all trials share the rungs, whatever their study."""

    def __init__(self, asha: StratifiedAsha):
        self.asha = asha

    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        return self.asha.decide("all", key, epoch, score)


class TimedScheduler:
    """Counts and times the decisions of another scheduler."""

    def __init__(self, asha: StratifiedAsha):
        self.asha, self.count, self.seconds = asha, 0, 0.0

    def decide(self, study: str, key: str, epoch: int, score: float | None) -> str:
        start = time.perf_counter()
        answer = self.asha.decide(study, key, epoch, score)
        self.seconds += time.perf_counter() - start
        self.count += 1
        return answer


# ---- replays


def load(path: Path, raw: bool = False) -> tuple[dict[str, Any], list[Curve]]:
    """Settings and curves of a recording, with `raw` those of the weights instead of their average. Raises InputError.

    Each curve is cut before its first score that is not finite.
    """
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
        # a trial that diverged in its first epoch has no recorded time
        seconds = trial["seconds"] / len(trial["curve"]) if trial["curve"] else float(np.mean(epochs))
        curves.append(Curve(trial["study"], trial["number"], tuple(scores), seconds))
    return recorded, curves


def shuffled(curves: list[Curve], seed: int, replay: int) -> list[Curve]:
    """The order of start in one replay: configurations at random, each in all studies in turn."""
    studies = list(dict.fromkeys(curve.study for curve in curves))
    places = {number: place for place, number in enumerate(
        np.random.default_rng([seed, replay]).permutation(sorted({curve.number for curve in curves})).tolist())}
    return sorted(curves, key=lambda curve: (places[curve.number], studies.index(curve.study)))


def searches(curves: list[Curve], epochs: int, arguments: argparse.Namespace) -> dict[str, Search]:
    studies = list(dict.fromkeys(curve.study for curve in curves))

    def asha(names: list[str]) -> StratifiedAsha:
        return StratifiedAsha(dict.fromkeys(names, epochs), grace=arguments.grace, reduction=arguments.reduction,
                              metric="val_top1", mode="max", file=None)

    def random(order: list[Curve]) -> list[Run]:
        by_study = [[curve for curve in order if curve.study == study] for study in studies]
        keys = {curve.key for group in by_study for curve in affordable(group, epochs, SHARE * epochs * len(group))}
        return simulate([curve for curve in order if curve.key in keys], NoStopping(), epochs, arguments.workers)

    return {STRATIFIED: lambda order: simulate(order, asha(studies), epochs, arguments.workers),
            MIXED: lambda order: simulate(order, SharedRungs(asha(["all"])), epochs, arguments.workers),
            RANDOM: random,
            FULL: lambda order: simulate(order, NoStopping(), epochs, arguments.workers)}


def replay(curves: list[Curve], epochs: int, arguments: argparse.Namespace) -> dict[str, dict[str, list[StudyResult]]]:
    """Search -> study -> result of each replay."""
    studies = {study: [curve for curve in curves if curve.study == study] for study in
               dict.fromkeys(curve.study for curve in curves)}
    results = {}
    for name, search in searches(curves, epochs, arguments).items():
        replays = [search(shuffled(curves, arguments.seed, number)) for number in range(arguments.replays)]
        results[name] = {study: [judge([run for run in runs if run.curve.study == study], recorded, epochs)
                                 for runs in replays] for study, recorded in studies.items()}
    return results


def row(study: str, search: str, results: list[StudyResult]) -> dict[str, Any]:
    """One line of the table, with the numbers of every replay; `met` is None for searches without a target."""
    regrets, shares, survivors = ([getattr(result, name) for result in results]
                                  for name in ("regret", "share", "survivors"))
    regret, share = float(np.median(regrets)), float(np.median(shares))
    return {"study": study, "search": search, "regret": round(regret, 4),
            "regret_90": round(float(np.percentile(regrets, 90)), 4), "share": round(share, 4),
            "share_90": round(float(np.percentile(shares, 90)), 4), "survivors": float(np.median(survivors)),
            "eliminated": round(survivors.count(0) / len(survivors), 4),
            "met": {"regret": regret <= REGRET, "share": share <= SHARE} if search == STRATIFIED else None,
            "replays": {"regret": [round(value, 4) for value in regrets],
                        "share": [round(value, 4) for value in shares], "survivors": survivors}}


def table(rows: list[dict[str, Any]]) -> str:
    header = ["study", "search", "median regret", "90th percentile", "share of budget", "survivors", "eliminated in"]
    results = [[row["study"], row["search"], f"{row['regret']:.2f}", f"{row['regret_90']:.2f}", f"{row['share']:.3f}",
                f"{row['survivors']:g}", f"{100 * row['eliminated']:.0f} %"] for row in rows]
    targets = [["target of stratified ASHA, at the median", "study", "measured", ""]]
    for name, target, unit in (("regret", REGRET, " points"), ("share", SHARE, " of the full budget")):
        targets += [[f"{name} <= {target:g}{unit}", row["study"], f"{row[name]:.3f}",
                     "met" if row["met"][name] else "missed"] for row in rows if row["met"] is not None]
    return "\n".join([*markdown_table([header, *results]), "", *markdown_table(targets)])


def described(curves: list[Curve], epochs: int, milestones: Iterable[int] = ()) -> list[dict[str, Any]]:
    """For each study: the number of configurations and of those that diverge, and how hard the best one is to find.

    "near" counts configurations within REGRET points of the best one. "agreement" is Spearman's rank correlation of the
    scores at each milestone with the final ones, over the configurations that do not diverge.
    """
    studies = []
    for study in dict.fromkeys(curve.study for curve in curves):
        members = [curve for curve in curves if curve.study == study]
        finals = [curve.final(epochs) for curve in members]
        ranks = pd.DataFrame([curve.scores for curve in members if len(curve.scores) == epochs]).rank()
        studies.append({"study": study, "configurations": len(members), "best": max(finals),
                        "median": float(np.median(finals)),
                        "near": sum(max(finals) - final <= REGRET for final in finals),
                        "agreement": {epoch: round(float(ranks[epoch - 1].corr(ranks[epochs - 1])), 3)
                                      for epoch in milestones},
                        "diverge": sum(len(curve.scores) < epochs for curve in members)})
    return studies


def heading(recorded: dict[str, Any], studies: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    images = f"{recorded['subset']} training images" if recorded.get("subset") else "all training images"
    lines = [f"Replayed: {recorded['metric']} on the holdout ({recorded['holdout']}) of {recorded['model']}, "
             f"{recorded['epochs']} epochs of {images}, {recorded['recipe']} with {recorded.get('overrides', {})}.",
             f"{arguments.replays} replays, {arguments.workers} workers, grace {arguments.grace}, reduction "
             f"{arguments.reduction}, seed {arguments.seed}."]
    lines += [f"Study {study['study']}: {study['configurations']} configurations; final score {study['best']:.2f} at "
              f"best, {study['median']:.2f} at the median; {study['near']} within {REGRET:g} points of the best, "
              f"{study['diverge']} diverge. Rank correlation with the end: "
              + ", ".join(f"{rho:.2f} after epoch {epoch}" for epoch, rho in study["agreement"].items()) + "."
              for study in studies]
    return "\n".join(lines)


# ---- decisions per second


def random_curves(seed: int) -> list[Curve]:
    """Noisy curves that rise to a random height at a random pace, in all studies in turn."""
    generator = np.random.default_rng(seed)
    curves = []
    for number in range(max(MARKS)):
        height, pace = generator.uniform(40, 90), generator.uniform(2, 20)
        scores = height * (1 - np.exp(-np.arange(1, LONG + 1) / pace)) + generator.normal(0, 0.5, LONG)
        curves.append(Curve(f"study{number % STUDIES}", number // STUDIES, tuple(scores.tolist()),
                            float(generator.uniform(0.7, 1.4))))
    return curves


def decisions(curves: list[Curve], arguments: argparse.Namespace, folder: Path | None) -> list[dict[str, Any]]:
    """Decisions per second and, in a second run, memory of the scheduler, which writes its rungs to `folder` if any."""
    rows: list[dict[str, Any]] = [{"rungs": "on disk" if folder else "in memory", "trials": mark} for mark in MARKS]
    for traced in (False, True):  # tracing memory slows down the decisions
        file = folder / f"rungs-{traced}" if folder else None
        if traced:
            gc.collect()
            tracemalloc.start()
        asha = StratifiedAsha(dict.fromkeys([curve.study for curve in curves], LONG), grace=arguments.grace,
                              reduction=arguments.reduction, metric="val_top1", mode="max", file=file)
        for line, (low, high) in zip(rows, itertools.pairwise((0, *MARKS)), strict=True):
            timed = TimedScheduler(asha)
            simulate(curves[low:high], timed, LONG, arguments.workers)
            if traced:
                gc.collect()
                line["kibibytes"] = round(tracemalloc.get_traced_memory()[0] / 1024, 1)
            else:
                line |= {"decisions": timed.count, "per_second": round(timed.count / timed.seconds),
                         "file_kibibytes": round(file.stat().st_size / 1024, 1) if file else 0.0}
    tracemalloc.stop()
    return rows


def decisions_table(rows: list[dict[str, Any]]) -> str:
    header = ["rungs", "after trials", "decisions since", "decisions per second", "scheduler, KiB", "file, KiB"]
    return "\n".join(markdown_table([header, *(
        [line["rungs"], str(line["trials"]), str(line["decisions"]), str(line["per_second"]),
         f"{line['kibibytes']:.0f}", f"{line['file_kibibytes']:.0f}"] for line in rows)]))


# ---- the command


def parser() -> Parser:
    parser = Parser(prog="python -m bench.asha_replay", description=__doc__)
    parser.add_argument("--curves", type=Path, default=Path("bench/data/curves.json"), help="recording (%(default)s)")
    parser.add_argument("--raw", action="store_true", help="take the scores of the weights, not of their average")
    parser.add_argument("--replays", type=int, default=200, help="simulated searches of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the order of configurations (%(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="trials at the same time (%(default)s)")
    parser.add_argument("--reduction", type=int, default=4,
                        help="one of this many trials continues at a rung (%(default)s, as in Ray)")
    parser.add_argument("--grace", type=int, default=1, help="first rung, in epochs (%(default)s)")
    parser.add_argument("--decisions", action="store_true", help="measure speed and memory of the scheduler instead")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    for name, low in (("replays", 1), ("seed", 0), ("workers", 1), ("reduction", 2), ("grace", 1)):
        if getattr(arguments, name) < low:
            raise InputError(f"--{name} {getattr(arguments, name)}, allowed: {low} and more")
    print(machine())
    content: dict[str, Any] = {"command": command("bench.asha_replay", argv), "machine": machine()}
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
        results = replay(curves, epochs, arguments)
        rows = [row(study["study"], name, results[name][study["study"]]) for study in studies for name in results]
        print(f"{heading(recorded, studies, arguments)}\n\n{table(rows)}")
        content |= {"replayed": recorded | {"studies": studies}, "settings": {
            name: getattr(arguments, name) for name in ("replays", "seed", "workers", "reduction", "grace")}}
    if arguments.json:
        head = json.dumps(content, indent=1).removesuffix("\n}")
        lines = ",\n".join(json.dumps(line) for line in rows)  # one per line, like the other measurements
        arguments.json.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
