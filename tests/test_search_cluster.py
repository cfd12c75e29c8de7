"""Trials on a cluster of several nodes: how many fit, trials of several workers, the loss of a node.

The cluster is real, with all nodes on this machine: a head without cores, as in many clusters, and two nodes of one
core each. A token protects it. Two workers are placed on two nodes.
"""

import os
import secrets
from pathlib import Path

import pytest

from nulsq.config import to_yaml
from nulsq.errors import InputError
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import read_outcome
from nulsq.train import train
from tune.ray_backend.cluster import check_fits, check_placement, environment, fits, open_cluster, wait_for_nodes

pytest.importorskip("ray")
from ray.tune import Callback  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# ---- how many trials fit, without a cluster


@pytest.mark.parametrize(("nodes", "resources", "at_once"), [
    ([(2, 0)], (1, 0, 1), 2),
    ([(2, 0)], (0.5, 0, 1), 4),
    ([(64, 8)] * 2, (8, 1, 4), 4),
    ([(64, 8)] * 2, (8, 1, 16), 1),  # the workers of a trial may be on several nodes
    ([(64, 8)], (16, 1, 1), 4),  # cores run out first
    ([(12, 2)], (1, 0.3, 1), 6),  # three trials on each GPU: none has parts of two
    ([(12, 4)], (1, 2, 1), 2),
    ([(0, 0), (1, 0), (1, 0)], (1, 0, 2), 1),  # a head without cores holds drivers, not workers
])
def test_number_of_trials_that_fit_at_once(nodes, resources, at_once):
    assert fits(nodes, *resources) == at_once


@pytest.mark.parametrize(("nodes", "resources", "message"), [
    ([(4, 1)] * 2, (8, 0, 1), "cpus = 8, gpus = 0: no node can hold one such trial "
                              "(nodes: 2 with 4 CPU, 1 GPU); at most cpus = 4, gpus = 1 would fit"),
    ([(4, 1), (16, 0)], (8, 1, 2), "no node can hold one such worker (nodes: 1 with 4 CPU, 1 GPU; 1 with 16 CPU, 0 GPU)"
                                   "; at most cpus = 4, gpus = 1 would fit"),
    ([(4, 0)], (1, 1, 1), "at most cpus = 4, gpus = 0 would fit"),
    ([(4, 4)] * 2, (1, 1, 16), "cpus = 1, gpus = 1 for each of workers = 16: only 8 such workers fit at once"),
    ([(4, 4)], (1, 0.5, 2), "a fraction of a GPU is for trials of one process"),
    ([(4, 4)], (1, 2, 2), "a worker drives one GPU"),
    ([(4, 4)], (1, 1.5, 1), "whole GPUs"),
])
def test_error_for_excessive_resources_states_what_would_fit(nodes, resources, message):
    with pytest.raises(InputError) as raised:
        fits(nodes, *resources)
    assert message in str(raised.value)


def test_trial_environment_keeps_caches_drops_secrets_and_resets_ranks(monkeypatch):
    for name in ("NULSQ_CACHE", "TORCHINDUCTOR_CACHE_DIR", "WANDB_MODE", "WANDB_API_KEY", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "7")
    variables = environment()
    assert variables["NULSQ_CACHE"] == variables["TORCHINDUCTOR_CACHE_DIR"] == variables["WANDB_MODE"] == "7"
    assert "WANDB_API_KEY" not in variables and (variables["RANK"], variables["WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize("address", ["remote", "ray://host:10001", "host:", "127.0.0.1:9"])
def test_invalid_address_is_an_error(address):
    with pytest.raises(InputError, match=f"address = {address}"), open_cluster(address):
        pass


# ---- a real cluster


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """While this file is there, the quantizer `tests.slowed` sleeps, on all nodes."""
    return tmp_path_factory.mktemp("cluster") / "slow"


@pytest.fixture(scope="module")
def cluster(slow):
    """Two nodes of one core each and a head without cores; this process is connected to it."""
    import ray._private.authentication_test_utils as authentication
    from ray.cluster_utils import Cluster

    with authentication.authentication_env_guard():
        authentication.set_auth_mode("token")
        authentication.set_env_auth_token(secrets.token_hex(32))
        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0",
                       "NULSQ_TEST_SLOW": str(slow)}
        authentication.reset_auth_token_state()  # earlier tests may have imported Ray, which reads them on import
        ray_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True,
                                                                    "dashboard_host": "127.0.0.1"})
        try:
            for _ in range(2):
                ray_cluster.add_node(num_cpus=1)
            with open_cluster(ray_cluster.address, workers=2, nodes=3):
                yield ray_cluster
        finally:
            ray_cluster.shutdown()
    authentication.reset_auth_token_state()


class Recorder(Callback):
    """Records the results that Tune receives, in order: number of the trial, epoch, score."""

    def __init__(self, at_result=None):
        self.results, self.at_result = [], at_result

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.results.append((trial.config["trial"]["number"], result["epoch"], result["val_top1"]))
        if self.at_result is not None:
            self.at_result(*self.results[-1][:2])

    def __getstate__(self):
        return {}  # Tune saves its callbacks; these are never restored


@pytest.fixture
def tune_trials(cluster, tmp_path):
    """Run a trial for each of the overrides, one at a time; returns Tune's result grid and the recorded results."""
    import ray.tune

    def run(function, resources, recipe, overrides, *, scheduler=None, at_result=None, workers=1):
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        identities = [{"study": "s", "number": number, "key": f"s/{number:03d}", "repeat": 0, "stratum": "s",
                       "overrides": trial_overrides} for number, trial_overrides in enumerate(overrides)]
        recorder = Recorder(at_result)
        grid = ray.tune.Tuner(
            ray.tune.with_resources(function, resources),
            param_space={"search_directory": str(tmp_path), "working_directory": str(ROOT), "metric": "val_top1",
                         "cpus": 1, "gpus": 0, "workers": workers, "trial": ray.tune.grid_search(identities)},
            tune_config=ray.tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=1),
            run_config=ray.tune.RunConfig(name="ray", storage_path=str(tmp_path), verbose=0, callbacks=[recorder],
                                          failure_config=ray.tune.FailureConfig(max_failures=1))).fit()
        return grid, recorder.results

    return run


@pytest.mark.ray
@pytest.mark.slow
def test_resource_checks_agree_with_a_real_cluster(cluster):
    assert check_fits(1, 0, 2) == 1 and check_fits(1, 0) == 2
    with pytest.raises(InputError, match="1 with 0 CPU, 0 GPU"):
        check_fits(2, 0)
    with pytest.raises(InputError, match="nodes = 4: the cluster has 3 after 0.5 s"):
        wait_for_nodes(4, seconds=0.5)
    check_placement(1, 0, 2)
    with pytest.raises(InputError, match="found no place within 2 s; free in the cluster: 2 CPU, 0 GPU"):
        check_placement(1, 0, 3, seconds=2)


@pytest.mark.ray
@pytest.mark.slow
def test_stopped_trial_of_two_workers_frees_resources_for_the_next(tune_trials, short, float_run, tmp_path, steps_done):
    """Only one such trial fits. One process trained the first trial until it was interrupted; two workers resume it
    until it is stopped. The second trial then gives the same results as a run in one process."""
    from ray.tune.schedulers import FIFOScheduler

    from tune.ray_backend import workers

    class StopTheFirst(FIFOScheduler):
        def on_trial_result(self, tune_controller, trial, result):
            return self.STOP if (trial.config["trial"]["number"], result["epoch"]) == (0, 2) else self.CONTINUE

    settings = {"model__init_from": str(float_run), "optim__freeze_bn": True, "optim__lr": 0.01, "optim__epochs": 2}
    first, second = (tmp_path / "trials/s" / name for name in ("000", "001"))
    interrupted = short("begun", **settings | {"optim__epochs": 40, "run__dir": str(first)})
    assert train(interrupted, quiet=True, stop=lambda: steps_done[-1] >= 5).status == "saved"  # in the second epoch
    before = read_metrics(first)
    single, recipe = short("one-process", **settings), short("two-workers", **settings)
    assert train(single, quiet=True).status == "finished"

    grid, results = tune_trials(workers.run, workers.DRIVER, recipe, [{"optim.epochs": 40}, {}],
                                scheduler=StopTheFirst(), workers=2)
    assert not grid.errors
    assert [entry[:2] for entry in results] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert len(before) == 1 and read_metrics(first)[:1] == before and 2 <= len(read_metrics(first)) < 40
    one_process, two_workers = read_metrics(path_of(single)), read_metrics(second)
    assert read_outcome(second)["outcome"] == "finished"
    assert [entry[2] for entry in results] == [line["val_top1"] for line in read_metrics(first)[:2] + two_workers]
    for a, b in zip(one_process, two_workers, strict=True):
        assert (a["val_images"], a["train_images"], a["step"]) == (b["val_images"], b["train_images"], b["step"])
        # Another summation order occasionally moves a value across a threshold, so losses drift apart slowly.
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-3)
    # One of the few validation images may be on the boundary between two classes.
    assert abs(one_process[0]["val_top1"] - two_workers[0]["val_top1"]) <= 100.1 / one_process[0]["val_images"]


@pytest.mark.ray
@pytest.mark.slow
def test_trial_resumes_on_another_node_after_its_node_is_lost(cluster, tune_trials, short, float_run, tmp_path, slow):
    """The old process outlives its node briefly, so epochs are slow until the trial reports again elsewhere."""
    from ray.util.state import list_actors

    from tune.ray_backend import trial

    recipe = short("lost", model__init_from=str(float_run), optim__epochs=4,
                   quant__activation__quantizer="tests.slowed")
    before = []

    def lose_the_node(number, epoch):
        if epoch == 2 and not before:
            (actor,) = (actor for actor in list_actors(cluster.address, filters=[("state", "=", "ALIVE")])
                        if actor.class_name.endswith("ImplicitFunc"))  # Tune's name for a trial of a function
            (node,) = (node for node in cluster.worker_nodes if node.node_id == actor.node_id)
            before.extend(read_metrics(tmp_path / "trials/s/000"))
            slow.write_text("1")
            cluster.remove_node(node, allow_graceful=False)
        elif epoch == 1:
            slow.unlink(missing_ok=True)

    grid, results = tune_trials(trial.run, {"cpu": 1}, recipe, [{}], at_result=lose_the_node)
    assert not grid.errors and len(before) == 2
    # After the loss the completed epochs are reported again, and training continues after them.
    assert [entry[1] for entry in results] == [1, 2, 1, 2, 3, 4]
    after = read_metrics(tmp_path / "trials/s/000")
    assert after[:2] == before  # even the times: no epoch was trained twice
    assert [entry[2] for entry in results[2:]] == [line["val_top1"] for line in after]
