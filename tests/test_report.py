"""The numbers of a search's report against hand-computed ones and slow references. The page: test_report_page.py."""

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nulsq.config import Recipe, load
from nulsq.run.directory import METRICS
from tests.searches import EPOCHS, SPACE, evaluation, marked_search, two_studies
from tune.report.effort import effort
from tune.report.exports import trial_table, write_exports
from tune.report.findings import Comparison
from tune.report.importance import importance
from tune.report.leaderboard import leaderboard
from tune.report.pareto import pareto_front
from tune.report.timeline import from_events
from tune.space import Sampler, Search, Trial
from tune.store import journal
from tune.store.results import TrialResult, collect
from tune.store.status import TrialStatus

for module in ("matplotlib", "optuna", "pandas", "pyarrow", "sklearn"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The findings of a search, and the paths of its exported files."""
    findings = two_studies(tmp_path_factory.mktemp("report") / "search")
    return findings, write_exports(findings)


def scores(folder: Path, key: str) -> list[float]:
    return [json.loads(line)["val_top1"] for line in (folder / "trials" / key / METRICS).open()]


# ---- leaderboard.txt, trials.csv, trials.parquet, best.yaml


def test_leaderboard_matches_the_run_directories(exported):
    findings, _ = exported
    folder, text = findings.folder, leaderboard(findings.search, findings.results, findings.tests)
    assert (folder / "leaderboard.txt").read_text() == text + "\n"
    epochs = repeated = 0
    for path in sorted((folder / "trials").glob("*/*")):
        count = len(scores(folder, f"{path.parent.name}/{path.name}"))
        epochs, repeated = epochs + count * ("-r" not in path.name), repeated + count * ("-r" in path.name)
    outcomes = [json.loads(path.read_text())["outcome"] for path in folder.glob("trials/*/*/outcome.json")]
    diverged = outcomes.count("diverged")
    assert diverged > 0
    assert text.splitlines()[-1] == (
        f"{epochs} epochs trained, {48 * EPOCHS - diverged * (EPOCHS - 3)} without early stopping, "
        f"{repeated} more for the finalists' other seeds")
    for study, test_top1, section in zip(("2", "4"), ("78.00", "86.00"), text.split("\n\n"), strict=False):
        lines = section.splitlines()
        assert lines[0] == f"study {study}: winner's test top-1 {test_top1} +- 1.00 (3 seeds, 359 images)"
        assert re.fullmatch(r"  trial  val_top1  epochs    status +lr  coeff_qparm_lr  +qparm_wd", lines[1])
        curves = {path.name: scores(folder, f"{study}/{path.name}") for path in (folder / "trials" / study).iterdir()}
        final_scores = {int(name): curve[-1] for name, curve in curves.items()
                        if len(curve) == EPOCHS and "-r" not in name}
        best = sorted(final_scores, key=lambda number: -final_scores[number])
        assert [line.split()[:4] for line in lines[2:5]] == [
            [str(number), f"{final_scores[number]:.2f}", str(EPOCHS), "finished"] for number in best[:3]]
        seeds = {number: [curves[f"{number:03d}{end}"][-1] for end in ("", "-r1", "-r2")] for number in best[:2]}
        assert lines[-2:] == [
            f"  finalist {number}: val_top1 {statistics.fmean(seeds[number]):.2f} +- "
            f"{statistics.stdev(seeds[number]):.2f} (3 seeds)"
            for number in sorted(seeds, key=lambda number: -statistics.fmean(seeds[number]))]


def test_leaderboard_without_repeats(tmp_path):
    search = marked_search(tmp_path / "search")
    results = collect(search, journal.read(search.directory))
    text = leaderboard(search, results, {"plain": [evaluation(96.1)]})
    assert "study plain: winner's test top-1 96.10 (359 images)\n  trial  val_top1  epochs    status  " in text
    assert "study -b-bold--b-: winner not evaluated on test" in text and "finalist" not in text


def test_parquet_equals_csv_and_both_equal_the_runs(exported):
    import pandas
    findings, _ = exported
    csv = pandas.read_csv(findings.folder / "trials.csv", dtype={"study": str})
    parquet = pandas.read_parquet(findings.folder / "trials.parquet")
    pandas.testing.assert_frame_equal(csv, parquet, check_dtype=False)
    assert list(csv) == ["study", "number", "repeat", "source", "status", "epochs", "val_top1", "best_val_top1",
                         "quant.bits", "optim.lr", "optim.coeff_qparm_lr", "optim.qparm_wd", "average_bits", "bytes",
                         "seconds", "run"]
    assert len(csv) == len(findings.results)
    for line in parquet.to_dict("records"):
        curve = [value for value in scores(findings.folder, str(Path(line["run"]).relative_to(
            findings.folder / "trials"))) if math.isfinite(value)]
        assert line["best_val_top1"] == max(curve)
        assert math.isnan(line["val_top1"]) if line["status"] == "diverged" else line["val_top1"] == curve[-1]


def test_column_of_mixed_or_nested_values_is_exported_as_text(tmp_path):
    search = Search(name="x", space={"a": Sampler("a.b", "choice", values=[[1], [2, 3]]),
                                     "c": Sampler("c.d", "choice", values=[1, "auto", None])})
    results = [TrialResult(Trial("x", i, {"a.b": [1], "c.d": value}), TrialStatus.FINISHED, 1, 5.0, [5.0], 1.0,
                           Path("r"))
               for i, value in enumerate([1, "auto", None])]
    table = trial_table(search, results)
    table.to_parquet(tmp_path / "x.parquet")
    assert list(table["a.b"]) == ["[1]"] * 3 and list(table["c.d"]) == ["1", "auto", "null"]
    assert table["bytes"].isna().all()


def test_best_yaml_is_the_recipe_of_the_winner(exported):
    findings, paths = exported
    for study, finalists in findings.finalists.items():
        winner, path = finalists[0].rows[0], findings.folder / "studies" / study / "best.yaml"
        assert path in paths
        trained, best = load(Recipe, winner.path / "recipe.yaml"), load(Recipe, path)
        assert best.optim == trained.optim and best.quant == trained.quant and best.data == trained.data
        assert best.run.seed == trained.run.seed and best.run.dir is None
        header = path.read_text().split("name:")[0]
        assert f"trial {winner.trial.number}, val_top1 {winner.score:.2f} on the holdout after {EPOCHS}" in header
        assert f"{finalists[0].mean:.2f} +- {finalists[0].spread:.2f} (3 seeds)" in header
        assert {"2": "78.00 +- 1.00", "4": "86.00 +- 1.00"}[study] in header
        assert f"# run:      python -m nulsq.train {path}\n" in header


# ---- the Pareto front


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12), st.sampled_from(["max", "min"]))
@settings(deadline=None)
def test_pareto_front_equals_a_comparison_of_all_pairs(points, mode):
    sign = 1 if mode == "max" else -1

    def dominated(i):
        return any(points[j][0] <= points[i][0] and sign * points[j][1] >= sign * points[i][1]
                   and points[j] != points[i] for j in range(len(points)))

    front = pareto_front([cost for cost, _ in points], [score for _, score in points], mode)
    assert sorted(front) == [i for i in range(len(points)) if not dominated(i)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


# ---- importance


def compared(count: int, response, seed: int = 0) -> Comparison:
    """Random trials; `response` computes each score from the hyperparameters."""
    random_ = random.Random(seed)
    drawn = [{name: sampler.quantile(random_.random()) for name, sampler in SPACE.items()} for _ in range(count)]
    results = [TrialResult(Trial("s", i, {}, values), TrialStatus.FINISHED, 1, 0.0, [0.0], 1.0, Path("r"))
               for i, values in enumerate(drawn)]
    return Comparison(1, results, [response(values, random_) for values in drawn], [False] * count)


def response_of_lr(drawn, random_):
    return math.log10(drawn["lr"]) + random_.gauss(0, 0.1)


def test_importance_finds_the_cause_and_is_more_certain_with_more_trials():
    few, many = (importance(SPACE, compared(count, response_of_lr), bootstraps=8, shuffles=3) for count in (10, 50))
    for shares in (few, many):
        assert max(shares.mean, key=shares.mean.get) == "lr"
    assert many.mean["lr"] > 0.8 and many.mean["lr"] > 2 * many.chance["lr"]
    assert many.spread["lr"] < few.spread["lr"] / 2
    assert many == importance(SPACE, compared(50, response_of_lr), bootstraps=8, shuffles=3)


def test_importance_uses_the_logarithm_of_a_log_uniform_hyperparameter():
    """The lower half of lr's logarithmic range is 5 % of its linear range, where the effect would vanish."""
    def step_response(drawn, _):
        return (drawn["lr"] < 0.0173) + 0.5 * (drawn["coeff_qparm_lr"] > 0.0173)

    shares = importance(SPACE, compared(60, step_response), bootstraps=4, shuffles=1)
    # The variances are 1/4 and 1/16. A forest of 60 trials finds about these shares.
    assert shares.mean["lr"] == pytest.approx(0.8, abs=0.1)
    assert shares.mean["coeff_qparm_lr"] == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize(("count", "response", "reason"), [
    (5, response_of_lr, "5 trials have a score at epoch 1, at least 8 are needed to estimate importance"),
    (20, lambda *_: 3.0, "all 20 trials have the same score at epoch 1"),
])
def test_importance_without_enough_information_states_the_reason(count, response, reason):
    shares = importance(SPACE, compared(count, response))
    assert shares.reason == reason and not shares.mean


def test_trials_are_compared_at_an_epoch_that_nearly_all_reached(exported):
    findings, _ = exported
    comparison = findings.comparison("2")
    trials = [result for result in findings.results if result.trial.study == "2" and not result.trial.repeat]
    assert comparison.epoch == 1 and len(comparison) == len(trials) == 24
    assert comparison.scores == [result.curve[0] for result in sorted(trials, key=lambda result: result.trial.number)]


# ---- time and effort


def test_timeline_assigns_lanes_and_omits_gaps_between_sessions():
    def event(time, kind, key=None):
        return {"time": time, "event": kind, "key": key}

    timeline = from_events([
        event(0, "session"), event(1, "start", "a"), event(2, "start", "b"), event(5, "end", "a"),
        event(6, "start", "c"), event(8, "result", "c"),  # killed
        event(1000, "session"), event(1001, "start", "b"), event(1002, "start", "c"), event(1004, "end", "c"),
        event(1005, "error", "b")])
    assert timeline.seconds == 8 + 5 and timeline.interruptions == [8] and timeline.lanes == 2
    assert {(span.key, span.begin, span.end, span.lane) for span in timeline.spans} == {
        ("a", 1, 5, 0), ("b", 2, 8, 1), ("c", 6, 8, 0), ("b", 9, 13, 0), ("c", 10, 12, 1)}
    assert from_events([]).lanes == 0


def test_effort_without_early_stopping(exported):
    findings, _ = exported
    actual = effort(findings)
    trials = [result for result in findings.results if not result.trial.repeat]
    full_seconds = sum(result.seconds * (1 if result.status == "diverged" else EPOCHS / result.epochs)
                       for result in trials)
    assert actual.seconds == pytest.approx(sum(result.seconds for result in trials))
    assert actual.full_seconds == pytest.approx(full_seconds)
