"""The simulated search equals a reference implementation of ASHA and meets its targets on the recorded curves."""

import gc
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bench.simulator import CONTINUE, STOP, Curve, NoStopping, Run, affordable, chosen, judge, simulate

pytest.importorskip("ray")
from bench import asha_replay  # noqa: E402
from bench.asha_replay import FULL, MIXED, RANDOM, STRATIFIED, parser, random_curves, replay, shuffled  # noqa: E402
from tune.ray_backend import scheduler  # noqa: E402
from tune.ray_backend.scheduler import StratifiedAsha  # noqa: E402

RECORDED = Path(__file__).resolve().parent.parent / "bench/data/curves.json"


def drawn(heights: dict[str, float], trials: int = 20, epochs: int = 10, seed: int = 0, even: bool = False):
    """Curves, studies in turn. Each configuration rises with noise towards a random height near that of its study, at a
    random pace; one in ten diverges. `even`: all take the same time and none diverges."""
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


class RecordingScheduler:
    """Wraps another scheduler and records its decisions: (study, key, epoch, score, answer)."""

    def __init__(self, other):
        self.other, self.decisions = other, []

    def decide(self, *result):
        answer = self.other.decide(*result)
        self.decisions.append((*result, answer))
        return answer


def outcomes(runs):
    return {run.curve.key: (run.epochs, run.status) for run in runs}


# ---- the simulator


def test_answers_equal_the_constants_of_the_scheduler():
    assert (scheduler.CONTINUE, scheduler.STOP) == (CONTINUE, STOP)


def test_free_worker_takes_the_next_trial():
    """Two workers; an epoch of b takes three times as long. c starts when a has finished, d when c has."""
    curves = [Curve(name, 0, (1.0, 2.0), 3.0 if name == "b" else 1.0) for name in "abcd"]
    recording = RecordingScheduler(NoStopping())
    runs = simulate(curves, recording, epochs=2, workers=2)
    assert [(decision[0], decision[2]) for decision in recording.decisions] == \
        [("a", 1), ("a", 2), ("b", 1), ("c", 1), ("c", 2), ("d", 1), ("b", 2), ("d", 2)]
    assert [(run.epochs, run.status) for run in runs] == [(2, "finished")] * 4


def test_diverged_trial_is_charged_the_epoch_of_its_divergence():
    curves = [Curve("s", 0, ()), Curve("s", 1, (5.0, 6.0)), Curve("s", 2, (1.0, 7.0, 8.0))]
    recording = RecordingScheduler(asha(["s"], epochs=3, grace=2))
    runs = simulate(curves, recording, epochs=3, workers=1)
    assert [(run.epochs, run.status) for run in runs] == [(1, "diverged"), (3, "diverged"), (3, "finished")]
    assert [decision[3] for decision in recording.decisions] == [None, 5.0, 6.0, None, 1.0, 7.0, 8.0]
    assert judge(runs, curves, 3).share == 7 / 9 and chosen(runs) is curves[2]


def reference_asha(curves, epochs, grace, reduction):
    """ASHA with one worker: a rung stops a trial below the (1 - 1/reduction) quantile of the earlier scores there."""
    rungs, outcome = {}, {}
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
        outcome[curve.key] = epoch, status
    return outcome


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("grace", "reduction"), [(1, 3), (2, 2), (1, 4), (5, 3)])
def test_search_with_one_worker_equals_the_asha_reference(seed, grace, reduction):
    curves = drawn({"2": 40, "4": 60}, seed=seed)
    actual = outcomes(simulate(curves, asha(["2", "4"], 10, grace, reduction), epochs=10, workers=1))
    assert actual == reference_asha(curves, 10, grace, reduction)
    assert {status for _, status in actual.values()} == {"finished", "stopped", "diverged"}


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_stratified_study_decides_as_in_a_search_of_its_own(workers):
    studies = {"2": 10, "3": 50, "4": 80}
    recording = RecordingScheduler(asha(studies))
    simulate(drawn(studies), recording, epochs=10, workers=workers)
    for study in studies:
        alone, own = asha([study]), [decision for decision in recording.decisions if decision[0] == study]
        assert [alone.decide(*result) for *result, _ in own] == [answer for *_, answer in own]
        assert {answer for *_, answer in own} == {CONTINUE, STOP}


def test_random_search_stays_within_its_budget():
    full, short = Curve("s", 0, (1.0,) * 10), Curve("s", 1, (1.0,) * 3)
    assert affordable([full] * 8, 10, budget=29) == [full] * 2
    assert affordable([short, full, full, full], 10, budget=30) == [short, full, full]  # 4 + 10 + 10


def test_simulated_choice_equals_the_ranking_of_the_search():
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


def test_replay_is_a_function_of_its_seed():
    curves = drawn({"2": 40, "4": 60}, trials=12)
    first, again, other = (replay(curves, 10, parser().parse_args(["--replays", "3", "--seed", seed]))
                           for seed in ("1", "1", "2"))
    assert first == again != other
    orders = [shuffled(curves, 1, number) for number in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for order in orders:
        assert sorted(order, key=lambda curve: curve.key) == sorted(curves, key=lambda curve: curve.key)
        assert [curve.study for curve in order] == ["2", "4"] * 12
        assert all(a.number == b.number for a, b in zip(order[::2], order[1::2], strict=True))


def test_only_mixed_rungs_eliminate_the_worse_study():
    # The first trial at a rung always continues; with even curves it belongs to the better study, which starts first.
    curves = drawn({"4": 80, "2": 10}, trials=27, even=True)
    results = replay(curves, 10, parser().parse_args(["--replays", "10"]))
    assert all(result.survivors == 0 for result in results[MIXED]["2"])
    for study in "24":
        assert all(result.survivors >= 1 for result in results[STRATIFIED][study])
        assert all(result.regret == 0 for result in results[FULL][study])
        assert all(result.share <= 0.25 for result in results[RANDOM][study])


def test_command_prints_what_it_replayed_and_writes_all_results(tmp_path, capsys):
    trials = [{"study": curve.study, "number": curve.number, "drawn": {}, "curve": list(curve.scores), "seconds": 4.0}
              for curve in drawn({"2": 40, "4": 60}, trials=6)]
    trials[3]["curve"] = [1.0, float("nan"), 3.0]  # cut before the first score that is not finite
    recorded = {"metric": "val_top1", "epochs": 10, "recipe": "r.yaml", "model": "a network", "holdout": "last:50",
                "subset": 100, "trials": trials}
    (tmp_path / "curves.json").write_text(json.dumps(recorded))
    argv = ["--curves", str(tmp_path / "curves.json"), "--replays", "2", "--json", str(tmp_path / "replay.json")]
    assert asha_replay.main(argv) == 0
    printed = capsys.readouterr().out
    for text in ("val_top1 on the holdout (last:50) of a network, 10 epochs of 100 training images, r.yaml",
                 "Study 4: 6 configurations", "| regret <= 0.3 points | 2 |",
                 "| share <= 0.25 of the full budget | 4 |"):
        assert text in printed
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


def test_agreement_is_the_rank_correlation_with_final_scores():
    curves = [Curve("2", n, (float(n), float(-n), 3.0 * n)) for n in range(5)] + [Curve("2", 5, (99.0,))]
    study, = asha_replay.described(curves, 3, [1, 2])
    assert study["agreement"] == {1: 1.0, 2: -1.0}  # without the trial that diverges: it has no final score
    assert (study["configurations"], study["diverge"], study["best"]) == (6, 1, 12.0)


# ---- many trials


def test_simulation_of_500_trials_in_18_studies_completes():
    curves = random_curves(0)
    studies = dict.fromkeys(curve.study for curve in curves)
    runs = simulate(curves, asha(studies, asha_replay.LONG), asha_replay.LONG, workers=8)
    assert (len(curves), len(studies)) == (500, 18)
    for study in studies:
        assert {run.status for run in runs if run.curve.study == study} == {"finished", "stopped"}


def bytes_per_rung_entry(epochs: int) -> float:
    """Memory that the scheduler keeps for the second 250 of 500 trials, per rung entry. Each trial is better than the
    earlier ones, so that none is stopped and each has an entry at rungs 1, 3 and 9."""
    draw = np.random.default_rng(0)
    curves = [Curve(f"study{n % 18}", n // 18, tuple((n + draw.random(epochs)).tolist())) for n in range(500)]
    asha_scheduler, memory = asha([f"study{n}" for n in range(18)], epochs), []
    tracemalloc.start()
    try:
        for half in (curves[:250], curves[250:]):
            assert all(run.status == "finished" for run in simulate(half, asha_scheduler, epochs, workers=8))
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return (memory[1] - memory[0]) / (250 * 3)


def test_memory_grows_by_rung_entries_alone():
    """An entry is a key, a float and their place in a dictionary. Epochs between the rungs leave nothing, although
    26-epoch trials have three times as many of them as 10-epoch ones."""
    few, many = bytes_per_rung_entry(10), bytes_per_rung_entry(26)
    assert many <= 1.1 * few  # 1.3 with one reference kept of every result, 2.4 with a pair of key and epoch
    assert few <= 300


# ---- the recording


def test_stopping_early_loses_little_on_the_recorded_curves():
    if not RECORDED.is_file():
        pytest.skip(f"no {RECORDED.name}: python -m bench.record_curves makes it, in hours")
    recorded, curves = asha_replay.load(RECORDED)
    studies = asha_replay.described(curves, recorded["epochs"])
    assert len(studies) >= 2 and recorded["epochs"] >= 16
    assert all(study["configurations"] >= 60 for study in studies)
    results = replay(curves, recorded["epochs"], parser().parse_args(["--replays", "40"]))
    for study, study_results in results[STRATIFIED].items():
        met = asha_replay.row(study, STRATIFIED, study_results)["met"]
        assert met == {"regret": True, "share": True}, study
    # With shared rungs, the 2-bit study keeps hardly any trial.
    assert asha_replay.row("2", MIXED, results[MIXED]["2"])["survivors"] <= 1
