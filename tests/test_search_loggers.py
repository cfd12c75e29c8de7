"""A search whose trials are logged to W&B and to MLflow by Ray's callbacks: offline, into files of their own."""

import json

import pytest

from nulsq.run.directory import read_metrics
from tests.searches import search
from tune.store import journal

pytest.importorskip("ray")
pytest.importorskip("wandb", reason="pip install 'nulsq[wandb]'")
mlflow = pytest.importorskip("mlflow", reason="pip install 'nulsq[mlflow]'")
pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_both_services_have_every_trial_its_settings_and_its_epochs(search_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    ended = search(search_file, f"dir={tmp_path}/out", "name=logged", "trials=2", "repeats=0",
                   "studies.bits.values=[2]", "studies.activation.values=[lsq]", "wandb=nulsq", f"mlflow={tracking}")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    trials = {trial.key: trial for trial in journal.read(tmp_path / "out")}
    curves = {key: [line["val_top1"] for line in read_metrics(tmp_path / "out" / "trials" / key)] for key in trials}
    client = mlflow.MlflowClient(tracking)
    runs = {run.data.params["trial/key"]: run
            for run in client.search_runs([client.get_experiment_by_name("logged").experiment_id])}
    assert runs.keys() == trials.keys() == {"lsq_2/000", "lsq_2/001"}
    for key, run in runs.items():
        history = client.get_metric_history(run.info.run_id, "val_top1")
        assert [(each.step, each.value) for each in history] == list(enumerate(curves[key], 1))
        assert run.data.params["trial/overrides/optim.lr"] == str(trials[key].drawn["lr"])
    files = [file.read_bytes() for file in (tmp_path / "out/wandb").glob("offline-run-*/*.wandb")]
    for key in trials:  # what `wandb sync` would send: a record for each epoch, with its value as JSON
        own = [written for written in files if key.encode() in written]
        assert len(own) == 1
        assert all(json.dumps(score).removesuffix(".0").encode() in own[0] for score in curves[key]), key
