"""The order of trials and the sources of their hyperparameters: invariants, without a cluster, on simulated scores."""

import dataclasses
import math
import random
from pathlib import Path

import pytest

from nulsq.errors import InputError
from tests.searches import write_search
from tune.queue import TrialQueue, all_trials, warm_start_results
from tune.samplers import STARTUP, Observation, sample_quasirandom, sample_random, sample_tpe
from tune.space import load_search, stratum
from tune.store import journal
from tune.store.results import TrialResult
from tune.store.status import TrialStatus

pytest.importorskip("optuna")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("in_the_checkout")
DEMO = ROOT / "configs/search/demo.yaml"


def score(trial, epoch):
    """Best near lr = 0.03; a function of the trial and the epoch."""
    noise = random.Random(f"{trial.key} {epoch}").random()
    return 80 - 8 * abs(math.log10(trial.drawn["lr"]) + 1.5) + epoch + noise


def end(queue, trial):
    """Report results up to the last epoch, or only for epoch 1 if the hyperparameters are poor."""
    stopped = score(trial, 1) < 78
    for epoch in (1,) if stopped else (1, 2, 3, 4):
        queue.result(trial.key, epoch, score(trial, epoch))
    queue.end(trial.key, TrialStatus.STOPPED if stopped else TrialStatus.FINISHED)


def results_of(queue):
    """The results that the folder of a search holds after an interruption."""
    return [TrialResult(trial, queue.status[key],
                        len(queue.curves[key]), queue.curves[key][-1] if queue.curves[key] else math.nan,
                        list(queue.curves[key]), 0.0, Path(key))
            for key, trial in queue.trials.items()]


def test_studies_take_turns_with_every_searcher():
    for searcher in ("random", "quasirandom", "tpe"):
        queue = TrialQueue(load_search(DEMO, [f"searcher={searcher}", "trials=12"]), [])
        order = []
        while (trial := queue.next()) is not None:
            order.append(trial)
            end(queue, trial)
        assert [trial.study for trial in order] == ["lsq_nulsq_2", "lsq_lsq_2"] * 12
        assert [trial.number for trial in order] == [number for number in range(12) for _ in range(2)]
        assert queue.finished


@pytest.mark.parametrize("searcher", ["random", "quasirandom", "tpe"])
def test_resumed_search_draws_the_samples_of_an_uninterrupted_one(searcher):
    search = load_search(DEMO, [f"searcher={searcher}", "trials=14", "finalists=2", "repeats=1"])
    uninterrupted, interrupted = TrialQueue(search, []), TrialQueue(search, [])
    expected, actual = [], []
    while (trial := uninterrupted.next()) is not None:
        expected.append(trial)
        end(uninterrupted, trial)
    for i in range(10_000):
        if i % 5 == 4:
            interrupted = TrialQueue(search, results_of(interrupted))  # from the files alone
        if (trial := interrupted.next()) is None:
            break
        actual.append(trial)
        end(interrupted, trial)
    assert actual == expected and len(actual) == uninterrupted.budget() == 32


def test_resumed_queue_returns_interrupted_trials_first_and_once():
    search = load_search(DEMO, ["trials=4"])
    queue = TrialQueue(search, [])
    first = [queue.next() for _ in range(3)]
    end(queue, first[1])
    resumed = TrialQueue(search, results_of(queue))
    assert resumed.unfinished() == 2
    assert [resumed.next() for _ in range(2)] == [first[0], first[2]]
    assert resumed.next().key not in {trial.key for trial in first}


def test_trial_that_no_process_took_is_returned_again():
    queue = TrialQueue(load_search(DEMO, ["retries=1"]), [])
    first = queue.next()
    queue.end(first.key, queue.failure(first.key))
    assert queue.status[first.key] is TrialStatus.WAITING and queue.next() == first
    queue.started.add(first.key)
    assert queue.failure(first.key) is TrialStatus.FAILED  # a process took it, and Tune has already tried it again
    queue.end(first.key, TrialStatus.WAITING)
    assert queue.next() == first and queue.failure(first.key) is TrialStatus.FAILED  # lost twice
    second = queue.next()
    assert second.key != first.key and queue.failure(second.key) is TrialStatus.WAITING


def test_finalists_are_repeated_after_all_trials_of_their_study():
    search = load_search(DEMO, ["trials=5", "finalists=2", "repeats=2", "studies.activation.values=[lsq]"])
    queue = TrialQueue(search, [])
    running = [queue.next() for _ in range(5)]
    for trial in running[:4]:
        end(queue, trial)
    assert queue.next() is None and not queue.idle and not queue.finished
    end(queue, running[4])
    repeats = []
    while (trial := queue.next()) is not None:
        repeats.append(trial)
        end(queue, trial)
    best = sorted(running, key=lambda trial: (-len(queue.curves[trial.key]), -queue.curves[trial.key][-1]))[:2]
    assert [(trial.number, trial.repeat) for trial in repeats] == [(trial.number, repeat) for repeat in (1, 2)
                                                                   for trial in best]
    assert [trial.overrides["run.seed"] for trial in repeats] == [1, 1, 2, 2]
    assert len({trial.key for trial in repeats}) == 4 and queue.finished


def test_quasirandom_samples_cover_the_space_more_evenly_than_random_ones():
    from scipy.stats import qmc

    def unit(drawn):
        return [(math.log(drawn[name]) - math.log(sampler.low)) / (math.log(sampler.high) - math.log(sampler.low))
                for name, sampler in search.space.items()]

    worse = 0
    for seed in range(10):
        search = load_search(DEMO, [f"seed={seed}"])
        even, uneven = ([unit(sample(search, number)) for number in range(32)]
                        for sample in (sample_quasirandom, sample_random))
        assert all(0 <= u <= 1 for point in even for u in point)
        worse += qmc.discrepancy(even) > qmc.discrepancy(uneven)
    assert worse == 0


def test_tpe_does_not_treat_early_scores_as_final():
    """Trials with a small lr are better after epoch 1, where they are stopped; those with a large lr are better at the
    end. TPE samples a large lr. If early scores were passed as final ones, it would sample a small lr."""
    search = load_search(DEMO, ["searcher=tpe", "space.lr.low=1e-4", "space.lr.high=1"])
    generator = random.Random(0)
    observations = []
    for i in range(24):
        lr = 10 ** (generator.uniform(-4, -2.5) if i % 2 else generator.uniform(-1.5, 0))
        drawn = sample_random(search, i) | {"lr": lr}
        observations.append(
            Observation(drawn, [90.0 + generator.random()], TrialStatus.STOPPED, {}) if i % 2 else
            Observation(drawn, [50.0, 60.0, 70.0, 80.0 + generator.random()], TrialStatus.FINISHED, {}))
    correct = [sample_tpe(search, "s", number, observations)["lr"] for number in range(30)]
    mislabeled = [dataclasses.replace(observation, status=TrialStatus.FINISHED, curve=observation.curve[-1:])
                  for observation in observations]
    misled = [sample_tpe(search, "s", number, mislabeled)["lr"] for number in range(30)]
    assert sum(lr > 0.01 for lr in correct) > 25 > 10 > sum(lr > 0.01 for lr in misled)


def test_tpe_finds_better_hyperparameters_than_random_samples():
    search = load_search(DEMO, ["searcher=tpe", "trials=40", "studies.activation.values=[lsq]", "space.lr.low=1e-4",
                                "space.lr.high=1"])
    queue = TrialQueue(search, [])
    while (trial := queue.next()) is not None:
        end(queue, trial)
    distances = [abs(math.log10(trial.drawn["lr"]) + 1.5) for trial in queue.trials.values()]
    assert sum(distances[20:]) / 20 < sum(distances[:STARTUP]) / STARTUP / 2
    assert [trial.source for trial in queue.trials.values()] == ["random"] * STARTUP + ["tpe"] * 30


def test_points_come_first_in_every_study():
    search = load_search(DEMO, ["points={mine: {lr: 0.01, coeff_qparm_lr: 0.02, qparm_wd: 1e-4}}", "trials=2"])
    trials = all_trials(search)
    assert [trial.source for trial in trials] == ["point"] * 2 + ["random"] * 2
    assert trials[1].overrides["optim.lr"] == 0.01 and trials[1].drawn["coeff_qparm_lr"] == 0.02
    assert trials[2].drawn == all_trials(load_search(DEMO, ["trials=2"]))[2].drawn  # the others are unchanged


def test_cases_set_several_keys():
    search = load_search(ROOT / "configs/search/cifar10.yaml")
    queue = TrialQueue(search, [])
    first = [queue.next() for _ in range(18)]
    assert len({trial.study for trial in first}) == 18
    selected = next(trial for trial in first if trial.study == "nulsq-a_3")
    assert selected.overrides["quant.weight.quantizer"] == "lsq" and selected.overrides["quant.bits"] == 3
    assert selected.overrides["quant.activation.quantizer"] == "nulsq" and selected.source == "point"


# ---- warm start


def test_warm_start_begins_with_the_best_trials_of_another_search(tmp_path):
    other = write_search(tmp_path / "other", {"bits": ("quant.bits", [2, 4])}, trials=16)
    file = tmp_path / "next.yaml"
    file.write_text(f"recipe: {ROOT}/configs/recipes/digits/w2a2.yaml\nwarm_start: {other.directory}\nwarm_best: 2\n"
                    "searcher: tpe\nstudies: {bits: {key: quant.bits, values: [2, 4]}}\nspace:\n"
                    + "".join(f"  {name}: {{key: {sampler.key}, low: {sampler.low}, high: {sampler.high}}}\n"
                              for name, sampler in other.space.items()))
    search = load_search(file)
    warm = warm_start_results(search)
    queue = TrialQueue(search, [], warm)
    first = [queue.next() for _ in range(6)]
    assert [trial.source for trial in first] == ["warm"] * 4 + ["tpe"] * 2  # TPE has enough observations at once
    best = {study: sorted((row for row in warm[study] if row.good), key=lambda row: (-row.epochs, -row.score))
            for study in ("2", "4")}
    assert [trial.drawn for trial in first[:4]] == [best[study][i].trial.drawn for i in range(2)
                                                    for study in ("2", "4")]

    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "is not the folder of a search .*there are .*other"),
                            (None, "ranked by val_top1, this search by val_loss")):
        changed = dataclasses.replace(search, **({"warm_start": str(folder)} if folder else {"metric": "val_loss"}))
        with pytest.raises(InputError, match=message):
            warm_start_results(changed)


# ---- two objectives


def test_trials_of_about_the_same_cost_share_a_stratum():
    search = load_search(DEMO, ["against=average_bits"])
    trial = all_trials(search)[0]
    strata = [stratum(search, dataclasses.replace(trial, cost={"average_bits": bits, "bytes": 1}))
              for bits in (2.1, 2.2, 2.4, 4.0)]
    assert strata == ["lsq_nulsq_2~2", "lsq_nulsq_2~2", "lsq_nulsq_2~2.5", "lsq_nulsq_2~4"]
    assert stratum(load_search(DEMO), trial) == "lsq_nulsq_2"


def test_tpe_with_two_objectives_samples_the_pareto_front():
    """Scores rise with the bits, and the best lr is the same for all bits. TPE samples all bits near that lr."""
    search = load_search(DEMO, ["searcher=tpe", "against=average_bits", "trials=60", "studies.bits.key=run.seed",
                                "studies.activation.values=[lsq]", "space.lr.low=1e-4", "space.lr.high=1",
                                "space.bits={key: quant.bits, sample: choice, values: [2, 3, 4]}"])
    queue = TrialQueue(search, [])
    while (trial := queue.next()) is not None:
        trial = dataclasses.replace(trial, cost={"average_bits": float(trial.drawn["bits"]), "bytes": 1})
        queue.trials[trial.key] = trial
        for epoch in range(1, 5):
            queue.result(trial.key, epoch, score(trial, epoch) + 3 * trial.drawn["bits"])
        queue.end(trial.key, TrialStatus.FINISHED)
    later = list(queue.trials.values())[30:]
    assert {trial.drawn["bits"] for trial in later} == {2, 3, 4}
    early = [abs(math.log10(trial.drawn["lr"]) + 1.5) for trial in list(queue.trials.values())[:STARTUP]]
    late = [abs(math.log10(trial.drawn["lr"]) + 1.5) for trial in later]
    assert sum(late) / len(late) < sum(early) / len(early)


# ---- the journal


def test_journal_returns_every_trial_and_recovers_from_truncation(tmp_path):
    trials = all_trials(load_search(DEMO, ["trials=3"]))
    for trial in trials:
        journal.append(tmp_path, trial)
    assert journal.read(tmp_path) == trials
    file = tmp_path / journal.TRIALS
    file.write_text(file.read_text()[:-40])  # a full disk
    journal.repair(tmp_path)
    assert journal.read(tmp_path) == trials[:-1]
    journal.append(tmp_path, trials[-1])
    assert journal.read(tmp_path) == trials
