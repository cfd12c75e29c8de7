"""The trials of a search as an array of runs without Ray, and the plan that a search prints for launchers."""

import contextlib
import fcntl
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import nulsq.train
from nulsq.config import load_recipe, to_yaml
from nulsq.run.directory import LAUNCH, METRICS, RunDirectory
from nulsq.run.status import RunStatus, read_outcome, write_status
from tests.searches import SPACE, write_search
from tune import array, status
from tune import search as searching
from tune.checks import network_cost
from tune.queue import TrialQueue, warm_start_results
from tune.ray_backend.trial_protocol import TrialSettings
from tune.space import base_recipe, load_search
from tune.store import journal
from tune.store.results import collect
from tune.store.status import TrialStatus

pytest.importorskip("ray")
EPOCHS = 2


@pytest.fixture(scope="module")
def array_search(short, tmp_path_factory) -> SimpleNamespace:
    """An array of two studies of three trials each: a point, the best trial of another search, a random sample. The
    search's folder already holds the launcher's folder."""
    folder = tmp_path_factory.mktemp("array")
    write_search(folder / "other", {"bits": ("quant.bits", [2, 4])}, trials=6)
    (folder / "recipe.yaml").write_text(to_yaml(short("trial", optim__epochs=EPOCHS)))
    file, out = folder / "tiny.yaml", folder / "out"
    file.write_text(f"recipe: {folder}/recipe.yaml\ndir: {out}\nwarm_start: {folder}/other\nwarm_best: 1\n"
                    "points: {published: {lr: 0.04, coeff_qparm_lr: 0.01, qparm_wd: 1e-4}}\n"
                    "studies: {bits: {key: quant.bits, values: [2, 4]}}\ntrials: 3\nrepeats: 1\nspace:\n"
                    + "".join(f"  {name}: {{key: {sampler.key}, low: {sampler.low}, high: {sampler.high}}}\n"
                              for name, sampler in SPACE.items()))
    (out / LAUNCH).mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert array.main([str(file)]) == 0
    return SimpleNamespace(file=str(file), out=out, printed=printed.getvalue())


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("searcher", ["random", "quasirandom"])
def test_array_has_the_same_trials_as_the_search(array_search, tmp_path, searcher):
    from tune.ray_backend.searcher import StudySearcher

    out, overrides = array_search.out, []
    if searcher != "random":
        out, overrides = tmp_path / "out", [f"searcher={searcher}", f"dir={tmp_path}/out", "warm_start=null",
                                            "studies.bits.values=[2]"]
        assert array.main([array_search.file, *overrides]) == 0
    search = load_search(array_search.file, overrides)
    folder = tmp_path / "searched"  # the folder of the same search on Ray
    folder.mkdir()
    searcher_of_tune = StudySearcher(TrialQueue(search, [], warm_start_results(search)), folder,
                                     lambda trial: network_cost(base_recipe(search, trial.overrides)))
    configurations = []
    while isinstance(suggested := searcher_of_tune.suggest(str(len(configurations))), dict):
        configurations.append(suggested | {"search_directory": str(out)})
    assert journal.read(out) == journal.read(folder)
    sources = [trial.source for trial in journal.read(out)]
    assert sources == (["point"] * 2 + ["warm"] * 2 + ["random"] * 2 if searcher == "random" else
                       ["point"] + ["quasirandom"] * 2)
    runs = (out / "array/runs.txt").read_text().splitlines()
    for number, (configuration, run) in enumerate(zip(configurations, runs, strict=True)):
        recipe = load_recipe(out / f"array/{number:05d}.yaml")
        assert recipe == TrialSettings.from_config(configuration).load_recipe() and recipe.run.dir == run


def test_array_is_written_on_a_machine_too_small_for_its_tasks(array_search, tmp_path, capsys):
    """A login node may write an array whose tasks need more than it has; a local search is an error there."""
    assert array.main([array_search.file, f"dir={tmp_path}/out", "warm_start=null", "gpus=8", "cpus=512"]) == 0
    assert searching.main([array_search.file, f"dir={tmp_path}/here", "warm_start=null", "gpus=8", "--dry-run"]) == 2
    assert "gpus" in capsys.readouterr().err


def test_same_command_changes_no_file_and_a_different_search_is_an_error(array_search, tmp_path, capsys):
    assert array_search.printed.endswith("\n6\n")
    assert f"python -m tune.search {array_search.file}" in array_search.printed
    before = files_of(array_search.out)
    assert array.main([array_search.file]) == 0 and capsys.readouterr().out == array_search.printed
    for overrides, message in (
        (["space.lr.high=0.2"], "holds another search (space.lr.high 0.3 -> 0.2)"),
        (["searcher=tpe", f"dir={tmp_path}/tpe"], "searcher = tpe learns from results"),
        (["data.batch=3"], "override: data: Key 'data' not in 'Search'"),
    ):
        assert array.main([array_search.file, *overrides]) == 2
        assert message in capsys.readouterr().err
    (array_search.out / "rungs").write_text('{"rungs": {}, "stopped": {"4/001": 1}}')
    assert array.main([array_search.file]) == 2 and "has stopped trials early" in capsys.readouterr().err
    (array_search.out / "rungs").unlink()
    assert files_of(array_search.out) == before and not (tmp_path / "tpe").exists()


def test_search_after_its_array_trains_only_the_repeats(array_search, tmp_path):
    out, settings = tmp_path / "out", [f"dir={tmp_path}/out", "trials=2", "warm_start=null"]
    assert array.main([array_search.file, *settings]) == 0
    runs = [RunDirectory(Path(line)) for line in (out / "array/runs.txt").read_text().splitlines()]
    assert nulsq.train.main([f"{out}/array/00000.yaml"]) == 0
    assert read_outcome(runs[0].path)["outcome"] == "finished" and not (runs[0].path / "test.json").exists()
    runs[1].path.mkdir(parents=True)
    with (runs[1].path / "lock").open("a") as file:
        assert "not finished, no task of its array runs" in status.describe(out)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"{out}: running" in status.describe(out)
    for run in runs[1:]:  # files as after training; their numbers do not matter here
        run.path.mkdir(parents=True, exist_ok=True)
        for epoch in range(1, EPOCHS + 1):
            run.append(METRICS, {"epoch": epoch, "val_top1": 99.0, "val_loss": 0.1, "seconds": 1.0})
        write_status(run.path, RunStatus.DIVERGED if run is runs[1] else RunStatus.FINISHED)
    search = load_search(array_search.file, settings)
    queue = TrialQueue(search, collect(search, journal.read(out)))
    assert [queue.status[trial.key] for trial in journal.read(out)] == ["finished", "diverged"] + ["finished"] * 2
    repeats = [queue.next() for _ in range(3)]
    assert [(trial.study, trial.number, trial.repeat) for trial in repeats[:2]] == [("2", 1, 1), ("4", 1, 1)]
    assert repeats[2] is None
    for trial in repeats[:2]:
        queue.end(trial.key, TrialStatus.FAILED)
    assert queue.finished
    without_repeats = load_search(array_search.file, [*settings, "repeats=0"])
    assert TrialQueue(without_repeats, collect(without_repeats, journal.read(out))).finished  # so Ray need not start


def test_dry_run_with_json_prints_the_plan_in_one_line(array_search, tmp_path, capsys, digits):
    assert searching.main([array_search.file, "--dry-run", "--json", f"dir={tmp_path}/never"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {"name": "tiny", "directory": f"{tmp_path}/never",
                    "recipe": str(array_search.out.parent / "recipe.yaml"), "data": str(digits), "searcher": "random",
                    "studies": ["2", "4"], "trials": 3, "total": 8, "workers": 1, "cpus": 1, "gpus": 0,
                    "address": "local", "hours": None, "begun": False, "finished": False}
    assert not (tmp_path / "never").exists()
    # The settings of the cluster may change: the same search can resume elsewhere.
    settings = ["address=head:6379", "nodes=3", "patience=20", "hours=5"]
    assert searching.main([array_search.file, "--dry-run", "--json", *settings]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and json.loads(printed) == plan | {
        "directory": str(array_search.out), "address": "head:6379", "hours": 5, "begun": True}
    assert searching.main([array_search.file, "--json"]) == 2 and "--json" in capsys.readouterr().err
