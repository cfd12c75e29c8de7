"""The simulated search: equal to ASHA by hand, and on the recorded curves as good as is promised."""

import gc
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bench.simulator import CONTINUE, STOP, Curve, Patience, Run, affordable, chosen, judge, simulate

pytest.importorskip("ray")
from bench import asha_replay  # noqa: E402
from bench.asha_replay import FULL, MIXED, RANDOM, STRATIFIED, parser, random_curves, replay, shuffled  # noqa: E402
from tune.ray_backend import scheduler  # noqa: E402
from tune.ray_backend.scheduler import StratifiedAsha  # noqa: E402

RECORDED = Path(__file__).resolve().parent.parent / "bench/data/curves.json"


def drawn(heights: dict[str, float], trials: int = 20, epochs: int = 10, seed: int = 0, even: bool = False):
    """Curves, studies in turn; each configuration rises towards a height of its own near its study's, with noise,
    takes its own time, and one in ten diverges somewhere. `even`: all take the same time and none diverges."""
    draw, curves = random.Random(seed), []
    for number in range(trials):
        for study, height in heights.items():
            top, pace = height + 10 * draw.random(), 1 + 3 * draw.random()
            scores = [top * (1 - 2 ** (-epoch / pace)) + draw.random() for epoch in range(1, epochs + 1)]
            length = draw.randrange(epochs) if draw.random() < 0.1 and not even else epochs
            curves.append(Curve(study, number, tuple(scores[:length]), 1.0 if even else 0.5 + draw.random()))
    return curves


def asha(studies, epochs=10, grace=1, reduction=3):
    return StratifiedAsha(dict.fromkeys(studies, epochs), grace=grace, reduction=reduction, metric="val_top1",
                          mode="max", file=None)


class Listening:
    """Another scheduler, with all that it was asked and answered."""

    def __init__(self, other):
        self.other, self.told = other, []

    def decide(self, *result):
        answer = self.other.decide(*result)
        self.told.append((*result, answer))
        return answer


def outcomes(runs):
    return {run.curve.key: (run.epochs, run.status) for run in runs}


# ---- the simulator


def test_answers_are_spelt_as_the_scheduler_spells_them():
    assert (scheduler.CONTINUE, scheduler.STOP) == (CONTINUE, STOP)


def test_workers_take_the_next_trial_when_they_are_free():
    """Two workers, an epoch of b takes three times as long: c and d come and go while b is in its first."""
    curves = [Curve(name, 0, (1.0, 2.0), 3.0 if name == "b" else 1.0) for name in "abcd"]
    listening = Listening(Patience())
    runs = simulate(curves, listening, epochs=2, workers=2)
    assert [(told[0], told[2]) for told in listening.told] == \
        [("a", 1), ("a", 2), ("b", 1), ("c", 1), ("c", 2), ("d", 1), ("b", 2), ("d", 2)]
    assert [(run.epochs, run.status) for run in runs] == [(2, "finished")] * 4


def test_a_trial_that_diverges_is_charged_the_epoch_in_which_it_does():
    curves = [Curve("s", 0, ()), Curve("s", 1, (5.0, 6.0)), Curve("s", 2, (1.0, 7.0, 8.0))]
    listening = Listening(asha(["s"], epochs=3, grace=2))
    runs = simulate(curves, listening, epochs=3, workers=1)
    assert [(run.epochs, run.status) for run in runs] == [(1, "diverged"), (3, "diverged"), (3, "finished")]
    assert [told[3] for told in listening.told] == [None, 5.0, 6.0, None, 1.0, 7.0, 8.0]
    assert judge(runs, curves, 3).share == 7 / 9 and chosen(runs) is curves[2]


def by_hand(curves, epochs, grace, reduction):
    """One worker: a trial goes on at a rung unless it is below the (1 - 1/reduction) percentile of those before it."""
    rungs, found = {}, {}
    for curve in curves:
        epoch, status = 0, None
        while status is None:
            epoch += 1
            if epoch > len(curve.scores):
                status = "diverged"
            elif epoch == epochs:
                status = "finished"
            elif epoch in [grace * reduction**k for k in range(10)]:
                before = rungs.setdefault((curve.study, epoch), [])
                if before and curve.scores[epoch - 1] < np.nanpercentile(before, (1 - 1 / reduction) * 100):
                    status = "stopped"
                before.append(curve.scores[epoch - 1])
        found[curve.key] = epoch, status
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("grace", "reduction"), [(1, 3), (2, 2), (1, 4), (5, 3)])
def test_one_worker_is_asha_by_hand(seed, grace, reduction):
    curves = drawn({"2": 40, "4": 60}, seed=seed)
    found = outcomes(simulate(curves, asha(["2", "4"], 10, grace, reduction), epochs=10, workers=1))
    assert found == by_hand(curves, 10, grace, reduction)
    assert {status for _, status in found.values()} == {"finished", "stopped", "diverged"}


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_a_stratified_study_decides_as_it_does_alone(workers):
    studies = {"2": 10, "3": 50, "4": 80}
    listening = Listening(asha(studies))
    simulate(drawn(studies), listening, epochs=10, workers=workers)
    for study in studies:
        alone, own = asha([study]), [told for told in listening.told if told[0] == study]
        assert [alone.decide(*result) for *result, _ in own] == [answer for *_, answer in own]
        assert {answer for *_, answer in own} == {CONTINUE, STOP}


def test_random_search_starts_only_what_is_paid_for():
    full, short = Curve("s", 0, (1.0,) * 10), Curve("s", 1, (1.0,) * 3)
    assert affordable([full] * 8, 10, budget=29) == [full] * 2
    assert affordable([short, full, full, full], 10, budget=30) == [short, full, full]  # 4 + 10 + 10


def test_the_choice_is_the_searchs_own():
    from tune.space import Trial
    from tune.store.results import TrialResult, ranked
    from tune.store.status import TrialStatus
    draw = random.Random(0)
    for _ in range(50):
        runs = []
        for number in range(6):
            epochs, status = draw.choice([(3, TrialStatus.STOPPED), (9, TrialStatus.STOPPED),
                                           (10, TrialStatus.FINISHED), (4, TrialStatus.DIVERGED)])
            scores = tuple(float(draw.randrange(5)) for _ in range(3 if status == "diverged" else 10))
            runs.append(Run(Curve("s", number, scores), epochs, status))
        rows = [TrialResult(trial=Trial("s", run.curve.number), status=run.status, epochs=run.epochs, seconds=1.0,
                            path=Path(), score=run.curve.final(run.epochs), curve=list(run.curve.scores[:run.epochs]))
                for run in runs]
        if all(run.status == "diverged" for run in runs):
            continue
        assert ranked(rows, "s", "max")[0].trial.number == chosen(runs).number


# ---- the replays


def test_a_replay_is_a_function_of_its_seed():
    curves = drawn({"2": 40, "4": 60}, trials=12)
    first, again, other = (replay(curves, 10, parser().parse_args(["--replays", "3", "--seed", seed]))
                           for seed in ("1", "1", "2"))
    assert first == again != other
    every = [shuffled(curves, 1, number) for number in range(3)]
    assert every[0] != every[1] != every[2]
    for order in every:
        assert sorted(order, key=lambda curve: curve.key) == sorted(curves, key=lambda curve: curve.key)
        assert [curve.study for curve in order] == ["2", "4"] * 12
        assert all(a.number == b.number for a, b in zip(order[::2], order[1::2], strict=True))


def test_mixed_rungs_eliminate_the_worse_study_and_stratified_ones_do_not():
    # the first at a rung goes on, however bad; with even curves that is always one of the better study, which starts
    curves = drawn({"4": 80, "2": 10}, trials=27, even=True)
    found = replay(curves, 10, parser().parse_args(["--replays", "10"]))
    assert all(each.survivors == 0 for each in found[MIXED]["2"])
    for study in "24":
        assert all(each.survivors >= 1 for each in found[STRATIFIED][study])
        assert all(each.regret == 0 for each in found[FULL][study])
        assert all(each.share <= 0.25 for each in found[RANDOM][study])


def test_what_was_replayed_is_said_and_everything_is_written(tmp_path, capsys):
    trials = [{"study": curve.study, "number": curve.number, "drawn": {}, "curve": list(curve.scores), "seconds": 4.0}
              for curve in drawn({"2": 40, "4": 60}, trials=6)]
    trials[3]["curve"] = [1.0, float("nan"), 3.0]  # cut before what is no number
    recorded = {"metric": "val_top1", "epochs": 10, "recipe": "r.yaml", "model": "a network", "holdout": "last:50",
                "subset": 100, "trials": trials}
    (tmp_path / "curves.json").write_text(json.dumps(recorded))
    argv = ["--curves", str(tmp_path / "curves.json"), "--replays", "2", "--json", str(tmp_path / "replay.json")]
    assert asha_replay.main(argv) == 0
    said = capsys.readouterr().out
    for words in ("val_top1 on the holdout (last:50) of a network, 10 epochs of 100 training images, r.yaml",
                  "Study 4: 6 configurations", "| regret <= 0.3 points | 2 |",
                  "| share <= 0.25 of the full budget | 4 |"):
        assert words in said
    written = json.loads((tmp_path / "replay.json").read_text())
    assert [(row["study"], row["search"]) for row in written["rows"]] == \
        [(study, search) for study in "24" for search in (STRATIFIED, MIXED, RANDOM, FULL)]
    assert all(len(row["replays"]["regret"]) == 2 for row in written["rows"])
    assert asha_replay.load(tmp_path / "curves.json")[1][3].scores == (1.0,)
    assert asha_replay.main([*argv, "--raw"]) == 2 and "recorded without optim.ema_decay" in capsys.readouterr().err
    trials[0]["raw"] = [2.0, 3.0]
    (tmp_path / "curves.json").write_text(json.dumps(recorded))
    assert [curve.scores for curve in asha_replay.load(tmp_path / "curves.json", raw=True)[1][:2]] == [(2.0, 3.0), ()]
    (tmp_path / "curves.json").write_text(json.dumps(recorded | {"metric": "val_loss"}))
    assert asha_replay.main(argv) == 2 and "allowed: val_top1" in capsys.readouterr().err
    assert asha_replay.main(["--curves", str(tmp_path / "none.json")]) == 2
    assert "python -m bench.record_curves" in capsys.readouterr().err


def test_what_early_scores_say_of_the_end_is_their_rank_correlation():
    curves = [Curve("2", n, (float(n), float(-n), 3.0 * n)) for n in range(5)] + [Curve("2", 5, (99.0,))]
    study, = asha_replay.described(curves, 3, [1, 2])
    assert study["agreement"] == {1: 1.0, 2: -1.0}  # the one that diverges in its second epoch has no end
    assert (study["configurations"], study["diverge"], study["best"]) == (6, 1, 12.0)


# ---- many trials


def test_five_hundred_trials_in_eighteen_studies_are_decided():
    curves = random_curves(0)
    studies = dict.fromkeys(curve.study for curve in curves)
    runs = simulate(curves, asha(studies, asha_replay.LONG), asha_replay.LONG, workers=8)
    assert (len(curves), len(studies)) == (500, 18)
    for study in studies:
        assert {run.status for run in runs if run.curve.study == study} == {"finished", "stopped"}


def grown(epochs: int) -> float:
    """Bytes that the scheduler keeps of the second 250 of 500 trials, a rung entry. Each trial is better than those
    before, so that none is stopped and every one leaves an entry at rungs 1, 3 and 9."""
    draw = np.random.default_rng(0)
    curves = [Curve(f"study{n % 18}", n // 18, tuple((n + draw.random(epochs)).tolist())) for n in range(500)]
    many, held = asha([f"study{n}" for n in range(18)], epochs), []
    tracemalloc.start()
    try:
        for half in (curves[:250], curves[250:]):
            assert all(run.status == "finished" for run in simulate(half, many, epochs, workers=8))
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return (held[1] - held[0]) / (250 * 3)


def test_memory_grows_by_rung_entries_alone():
    """An entry is a key, a float and their place in a dictionary; nothing is kept of the epochs between the rungs,
    of which 26-epoch trials have three times as many as 10-epoch ones."""
    few, many = grown(10), grown(26)
    assert many <= 1.1 * few  # 1.3 with one reference kept of every result, 2.4 with a pair of key and epoch
    assert few <= 300


# ---- the recording


def test_stopping_early_loses_little_on_the_recorded_curves():
    if not RECORDED.is_file():
        pytest.skip(f"no {RECORDED.name}: python -m bench.record_curves makes it, in hours")
    recorded, curves = asha_replay.load(RECORDED)
    studies = asha_replay.described(curves, recorded["epochs"])
    assert len(studies) >= 2 and recorded["epochs"] >= 16
    assert all(each["configurations"] >= 60 for each in studies)
    found = replay(curves, recorded["epochs"], parser().parse_args(["--replays", "40"]))
    for study, each in found[STRATIFIED].items():
        met = asha_replay.row(study, STRATIFIED, each)["met"]
        assert met == {"regret": True, "share": True}, study
    # Sharing rungs, the 2-bit study has next to nothing left.
    assert asha_replay.row("2", MIXED, found[MIXED]["2"])["survivors"] <= 1
