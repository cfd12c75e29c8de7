"""Jobs on a real Slurm of two nodes: results equal those of `launch local`; interrupted runs are requeued."""

import json
import sys
import time
from pathlib import Path

import pytest

from launch import jobs, slurm
from launch.__main__ import main as launch
from launch.job_spec import JobSpec, job_name
from launch.site import Site, load_site
from nulsq.config import to_yaml
from nulsq.run import checkpoint
from nulsq.run.directory import path_of, read_metrics
from nulsq.run.status import read_outcome
from tests.runs import assert_same_state, last, numbers
from tests.slurm_cluster import text_of

# The waits inside these tests have their own time limits, whose messages say what was awaited.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 5


@pytest.fixture
def queue(two_nodes):
    """The cluster, with an empty queue before and after each test."""
    yield two_nodes
    two_nodes.empty()


@pytest.fixture(scope="module")
def recipe_of(short, float_run, tmp_path_factory):
    """recipe_of(name): a recipe file of five epochs of four steps, and its run directory."""
    folder = tmp_path_factory.mktemp("jobs")

    def make(name, **overrides):
        recipe = short(name, model__init_from=str(float_run), optim__epochs=EPOCHS, run__root=str(folder / "runs"),
                       quant__activation__quantizer="tests.slowed", **overrides)
        path = folder / f"{name}.yaml"
        path.write_text(to_yaml(recipe))
        return path, path_of(recipe)
    return make


@pytest.fixture(scope="module")
def local_run(recipe_of):
    """The run directory of the same recipe, trained by two processes on this machine."""
    path, run = recipe_of("local")
    assert launch(["local", "train", str(path), "--nproc", "2"]) == 0
    return run


@pytest.fixture
def site_file(tmp_path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("kind: slurm\nnodes: 2\nhours: 0.5\nwarn: 20\nrestarts: 3\npreflight: false\n")
    return path


def submit(recipe: Path, run: Path, site: Site, **more) -> jobs.Job:
    """Submit as `launch slurm train --submit` does, but skip the check that runs in a subprocess."""
    spec = JobSpec("train", str(recipe), [], run, Path("unused"), job_name(run.name))
    return slurm.submit(spec, site, ["python"], **more)


def assert_same_run(run: Path, other: Path) -> None:
    """Assert that both runs have the same metrics in every epoch and bit-identical final states."""
    assert read_outcome(run)["outcome"] == "finished"
    assert numbers(run) == numbers(other)
    assert_same_state(last(run), last(other))


def has_epochs(run: Path, epochs: int = 1):
    return lambda: len(read_metrics(run)) >= epochs


def test_run_on_two_nodes_equals_run_of_two_local_ranks(queue, recipe_of, local_run, site_file, tmp_path, capsys):
    """Submitted from the command line, with staged data and preflight."""
    path, run = recipe_of("nodes")
    command = ["slurm", "train", str(path), "--site", str(site_file), "--at", "preflight=true", "--at",
               f"scratch={tmp_path}", "--submit"]
    assert launch(command) == 0
    printed = capsys.readouterr().out
    job = jobs.latest(run)
    assert f"job {job.id}" in printed and f"launch logs {run} --follow" in printed
    assert launch(command) == 2  # a run has at most one job
    assert f"job {job.id} (" in (error := capsys.readouterr().err) and f"holds {run}" in error
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert_same_run(run, local_run)
    # The run's folder records what ran, where and with which code.
    folder = job.path
    assert (folder / "job.sh").is_file() and f"SLURM_JOB_ID={job.id}" in (
        folder / f"environment-{job.id}.txt").read_text()
    assert "snapshot of commit" in (run / "code.txt").read_text() and Path(job.code, "nulsq/train.py").is_file()
    assert json.loads((folder / f"preflight-{job.id}-0.json").read_text())["ok"]
    assert len(list(tmp_path.glob("nulsq-data-*/*/manifest.json"))) == 1
    assert launch(["status", str(run)]) == 0 and launch(["logs", str(run)]) == 0 and launch(["stop", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"slurm job {job.id}" in printed and "outcome: finished (epoch 5)" in printed
    assert "epoch 5/5" in printed and "preflight passed" in printed and "it had ended" in printed


def test_run_is_requeued_at_its_time_limit_up_to_the_allowed_restarts(queue, recipe_of, local_run, site_file, slow):
    """The first attempt ends at its time limit, which is set while it trains: Slurm counts in minutes and checks twice
    a minute. SIGTERM ends the second attempt, the last one allowed. A new job then equals the uninterrupted run."""
    slow.write_text("0.12")  # the five epochs take a minute
    path, run = recipe_of("limit")
    site = load_site(site_file, ["restarts=1", "warn=120"])
    job = submit(path, run, site)
    queue.wait(has_epochs(run), "the first epoch")
    hours, minutes, seconds = map(int, queue.job(job.id)["RunTime"].split(":"))
    limit = (3600 * hours + 60 * minutes + seconds + 75) // 60 + 1
    queue.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}")
    queue.wait(lambda: queue.job(job.id)["Restarts"] == "1", "the requeue at the limit", 200)
    saved = read_outcome(run)
    assert saved["outcome"] == "saved" and saved["step"] > 0, text_of(job)
    slow.write_text("0.02")
    queue.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    queue.wait(lambda: read_outcome(run)["outcome"] == "running", "the second attempt")
    queue.run("scancel", "--signal=TERM", job.id)  # sent to the processes of the step, like a preemption without USR1
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "99:0", "1"), text_of(job)
    assert "back into the queue" in text_of(job) and "at most 1 are allowed" in text_of(job)
    slow.unlink()
    second_job = submit(path, run, site)
    assert queue.ended(second_job.id)["JobState"] == "COMPLETED", text_of(second_job)
    assert_same_run(run, local_run)
    assert len(jobs.submitted(run)) == 2


def test_run_is_requeued_after_a_node_goes_down(queue, recipe_of, local_run, site_file, slow):
    path, run = recipe_of("node")
    job = submit(path, run, load_site(site_file))
    queue.wait(has_epochs(run), "the first epoch")
    queue.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    queue.wait(lambda: queue.job(job.id)["JobState"] == "PENDING", "the requeue", 60)
    slow.unlink()
    queue.run("scontrol", "update", "nodename=n2", "state=resume", check=False)
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert queue.job(job.id)["Restarts"] == "1"
    assert_same_run(run, local_run)


@pytest.mark.long
def test_run_is_requeued_after_a_node_crashes(queue, recipe_of, local_run, site_file, slow):
    """Slurm would notice only after five minutes. The other node's ranks fail earlier and the job is requeued; it is
    requeued once more if the next attempt gets a signal that was meant for the previous one."""
    path, run = recipe_of("crash")
    job = submit(path, run, load_site(site_file))
    queue.wait(has_epochs(run), "the first epoch")
    queue.crash("n2")
    queue.wait(lambda: "a node does not answer; back into the queue" in text_of(job), "the requeue")
    slow.unlink()
    queue.run("slurmd", "-N", "n2")
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert int(queue.job(job.id)["Restarts"]) >= 1
    assert_same_run(run, local_run)


def test_run_is_requeued_after_its_step_is_killed_from_outside(queue, recipe_of, local_run, site_file, slow):
    """Slurm itself does so: it repeats, for step 0 of the next attempt, a kill that a crashed node did not receive."""
    path, run = recipe_of("killed")
    job = submit(path, run, load_site(site_file))
    queue.wait(has_epochs(run), "the first epoch")
    queue.run("scancel", "--signal=KILL", f"{job.id}.0")
    queue.wait(lambda: "killed from outside; back into the queue" in text_of(job), "the requeue")
    slow.unlink()
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert queue.job(job.id)["Restarts"] == "1"
    assert_same_run(run, local_run)


def test_preempted_run_saves_and_is_requeued(queue, recipe_of, local_run, site_file, slow):
    path, run = recipe_of("low")
    job = submit(path, run, load_site(site_file, ["partition=low"]))
    queue.wait(has_epochs(run), "the first epoch")
    urgent = queue.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
                       "--wrap=sleep 1").strip()
    assert queue.ended(urgent)["JobState"] == "COMPLETED"
    assert read_outcome(run)["outcome"] == "saved", text_of(job)  # it saved within the grace time and was not killed
    slow.unlink()
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert_same_run(run, local_run)


def test_cancelled_run_is_not_requeued_and_keeps_its_checkpoint(queue, recipe_of, local_run, site_file, slow):
    path, run = recipe_of("cancelled")
    job = submit(path, run, load_site(site_file))
    queue.wait(has_epochs(run), "the first epoch")
    queue.run("scancel", job.id)
    assert queue.ended(job.id)["JobState"] == "CANCELLED"
    time.sleep(2)
    assert queue.job(job.id)["JobState"] == "CANCELLED" and queue.job(job.id)["Restarts"] == "0"
    assert checkpoint.load(checkpoint.newest(run))["epoch"] >= 1
    # `launch stop` saves the run, which is not requeued either
    job = submit(path, run, load_site(site_file))
    queue.wait(lambda: read_outcome(run)["outcome"] == "running" and len(read_metrics(run)) > 1, "the next epoch")
    assert launch(["stop", str(run)]) == 0
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "99:0"), text_of(job)
    assert read_outcome(run)["outcome"] == "saved" and "a stop was requested" in text_of(job)
    slow.unlink()
    job = submit(path, run, load_site(site_file))
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert_same_run(run, local_run)


def test_failed_run_is_not_requeued(queue, recipe_of, site_file, tmp_path):
    """The run's folder has a name that an unquoted script would execute."""
    path, run = recipe_of("fails", optim__lr=1e30, guard__rollbacks=0, run__dir=str(tmp_path / "a b'$(touch PWNED) %j"))
    job = submit(path, run, load_site(site_file, ["nodes=1"]))
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), text_of(job)
    assert read_outcome(run)["outcome"] == "diverged" and "outcome diverged" in text_of(job)
    assert list(job.path.glob(f"{job.id}-*.log")) and not (Path.cwd() / "PWNED").exists()


def test_broken_python_on_a_node_fails_the_job(queue, recipe_of, site_file, tmp_path):
    """srun ends the waiting ranks of the other node; this does not count as a kill from outside, so no requeue."""
    path, run = recipe_of("broken")
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
if [[ $* == *torch.distributed.run* ]]; then
    if [[ $SLURMD_NODENAME == n1 ]]; then sleep 2; exit 3; fi
    exec sleep 100
fi
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    job = submit(path, run, load_site(site_file, [f"python={python}"]))
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), text_of(job)
    assert "task 0: Exited with exit code 3" in text_of(job) and "task 1: Terminated" in text_of(job)


def test_failed_preflight_ends_the_job_before_training(queue, recipe_of, site_file):
    path, run = recipe_of("wrong")
    job = submit(path, run, load_site(site_file, ["nodes=1", "preflight=true", "disk=1e9"]))
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "4:0", "0"), text_of(job)
    assert "FAILED  disk" in text_of(job) and "preflight failed" in text_of(job)
    assert not (run / "recipe.yaml").exists()


@pytest.mark.parametrize(("settings", "flags", "message"), [
    (["partition=mian"], [], "partition = mian: this cluster has none of that name. There are high, low, main"),
    (["gpus=2"], [], "gpus = 2 in partition main: a node there has at most 0"),
    (["cpus=64"], [], "cpus = 64 in partition main: a node there has at most 2"),
    (["nodes=3"], [], "nodes = 3 in partition main: in it are at most 2"),
    (["hours=100"], [], "hours = 100 in partition main: its limit is 10"),
    ([], ["constraint=h100"], "sbatch refuses the job"),
])
def test_resource_that_the_cluster_lacks_is_an_error(two_nodes, recipe_of, site_file, settings, flags, message):
    path, run = recipe_of("misuse")
    with pytest.raises(slurm.InputError) as raised:
        submit(path, run, load_site(site_file, settings, flags))
    assert message in str(raised.value)
    assert not jobs.submitted(run) and not two_nodes.run("squeue", "--noheader").strip()


def test_array_above_the_limit_of_slurm_is_an_error(two_nodes):
    slurm.check_array(100)
    with pytest.raises(slurm.InputError, match="an array of this Slurm has at most 100"):
        slurm.check_array(101)
