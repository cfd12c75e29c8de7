"""The trials of a search as an array of runs without Ray, and the plan of a search for launchers."""

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
from tests.searches import SPACE, made_search
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
def made(short, tmp_path_factory) -> SimpleNamespace:
    """An array of two studies of three trials: a point, the best of another search, a random sample. A launcher has put
    its own folder there before."""
    folder = tmp_path_factory.mktemp("array")
    made_search(folder / "other", {"bits": ("quant.bits", [2, 4])}, trials=6)
    (folder / "recipe.yaml").write_text(to_yaml(short("trial", optim__epochs=EPOCHS)))
    file, out = folder / "tiny.yaml", folder / "out"
    file.write_text(f"recipe: {folder}/recipe.yaml\ndir: {out}\nwarm_start: {folder}/other\nwarm_best: 1\n"
                    "points: {published: {lr: 0.04, coeff_qparm_lr: 0.01, qparm_wd: 1e-4}}\n"
                    "studies: {bits: {key: quant.bits, values: [2, 4]}}\ntrials: 3\nrepeats: 1\nspace:\n"
                    + "".join(f"  {name}: {{key: {each.key}, low: {each.low}, high: {each.high}}}\n"
                              for name, each in SPACE.items()))
    (out / LAUNCH).mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert array.main([str(file)]) == 0
    return SimpleNamespace(file=str(file), out=out, printed=printed.getvalue())


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("searcher", ["random", "quasirandom"])
def test_an_array_has_the_same_trials_as_the_search(made, tmp_path, searcher):
    from tune.ray_backend.searcher import StudySearcher

    out, overrides = made.out, []
    if searcher != "random":
        out, overrides = tmp_path / "out", [f"searcher={searcher}", f"dir={tmp_path}/out", "warm_start=null",
                                            "studies.bits.values=[2]"]
        assert array.main([made.file, *overrides]) == 0
    search = load_search(made.file, overrides)
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


def test_an_array_is_written_where_none_of_its_tasks_would_fit(made, tmp_path, capsys):
    """On a login node."""
    assert array.main([made.file, f"dir={tmp_path}/out", "warm_start=null", "gpus=8", "cpus=512"]) == 0
    assert searching.main([made.file, f"dir={tmp_path}/here", "warm_start=null", "gpus=8", "--dry-run"]) == 2
    assert "gpus" in capsys.readouterr().err


def test_the_same_command_writes_the_same_files_and_another_search_none(made, tmp_path, capsys):
    assert made.printed.endswith("\n6\n") and f"python -m tune.search {made.file}" in made.printed
    before = files_of(made.out)
    assert array.main([made.file]) == 0 and capsys.readouterr().out == made.printed
    for overrides, message in (
        (["space.lr.high=0.2"], "holds another search (space.lr.high 0.3 -> 0.2)"),
        (["searcher=tpe", f"dir={tmp_path}/tpe"], "searcher = tpe learns from results"),
        (["data.batch=3"], "override: data: Key 'data' not in 'Search'"),
    ):
        assert array.main([made.file, *overrides]) == 2
        assert message in capsys.readouterr().err
    (made.out / "rungs").write_text('{"rungs": {}, "stopped": {"4/001": 1}}')
    assert array.main([made.file]) == 2 and "has stopped trials early" in capsys.readouterr().err
    (made.out / "rungs").unlink()
    assert files_of(made.out) == before and not (tmp_path / "tpe").exists()


def test_after_its_array_a_search_has_only_repeats_left(made, tmp_path):
    out, settings = tmp_path / "out", [f"dir={tmp_path}/out", "trials=2", "warm_start=null"]
    assert array.main([made.file, *settings]) == 0
    runs = [RunDirectory(Path(line)) for line in (out / "array/runs.txt").read_text().splitlines()]
    assert nulsq.train.main([f"{out}/array/00000.yaml"]) == 0
    assert read_outcome(runs[0].path)["outcome"] == "finished" and not (runs[0].path / "test.json").exists()
    runs[1].path.mkdir(parents=True)
    with (runs[1].path / "lock").open("a") as file:
        assert "not finished, no task of its array runs" in status.describe(out)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"{out}: running" in status.describe(out)
    for run in runs[1:]:  # as if trained: their numbers do not matter here
        run.path.mkdir(parents=True, exist_ok=True)
        for epoch in range(1, EPOCHS + 1):
            run.append(METRICS, {"epoch": epoch, "val_top1": 99.0, "val_loss": 0.1, "seconds": 1.0})
        write_status(run.path, RunStatus.DIVERGED if run is runs[1] else RunStatus.FINISHED)
    search = load_search(made.file, settings)
    queue = TrialQueue(search, collect(search, journal.read(out)))
    assert [queue.status[trial.key] for trial in journal.read(out)] == ["finished", "diverged"] + ["finished"] * 2
    again = [queue.next() for _ in range(3)]
    assert [(trial.study, trial.number, trial.repeat) for trial in again[:2]] == [("2", 1, 1), ("4", 1, 1)]
    assert again[2] is None
    for trial in again[:2]:
        queue.end(trial.key, TrialStatus.FAILED)
    assert queue.finished
    alone = load_search(made.file, [*settings, "repeats=0"])
    assert TrialQueue(alone, collect(alone, journal.read(out))).finished  # nothing to start a Ray for


def test_a_plan_for_programs_is_one_line_of_json(made, tmp_path, capsys, digits):
    assert searching.main([made.file, "--dry-run", "--json", f"dir={tmp_path}/never"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {"name": "tiny", "directory": f"{tmp_path}/never", "recipe": str(made.out.parent / "recipe.yaml"),
                    "data": str(digits), "searcher": "random", "studies": ["2", "4"], "trials": 3, "total": 8,
                    "workers": 1, "cpus": 1, "gpus": 0, "address": "local", "hours": None, "begun": False,
                    "finished": False}
    assert not (tmp_path / "never").exists()
    # Settings of the cluster may change: the same search continues elsewhere.
    settings = ["address=head:6379", "nodes=3", "patience=20", "hours=5"]
    assert searching.main([made.file, "--dry-run", "--json", *settings]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and json.loads(printed) == plan | {
        "directory": str(made.out), "address": "head:6379", "hours": 5, "begun": True}
    assert searching.main([made.file, "--json"]) == 2 and "--json" in capsys.readouterr().err
