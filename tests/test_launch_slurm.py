"""Jobs on a real Slurm of two nodes: they train what `launch local` trains, and come back after whatever ends them."""

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

# Their own waits are bounded, and say what they waited for.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 5


@pytest.fixture
def queue(two_nodes):
    """The cluster, with nothing in its queue before and after."""
    yield two_nodes
    two_nodes.empty()


@pytest.fixture(scope="module")
def recipe_of(short, float_run, tmp_path_factory):
    """recipe_of(name): a recipe file of five epochs of four steps, and its own run directory."""
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
    """The same recipe, launched on this machine in two processes."""
    path, run = recipe_of("local")
    assert launch(["local", "train", str(path), "--nproc", "2"]) == 0
    return run


@pytest.fixture
def site_file(tmp_path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("kind: slurm\nnodes: 2\nhours: 0.5\nwarn: 20\nrestarts: 3\npreflight: false\n")
    return path


def submit(recipe: Path, run: Path, site: Site, **more) -> jobs.Job:
    """As `launch slurm train --submit`, without the check in a process of its own."""
    work = JobSpec("train", str(recipe), [], run, Path("unused"), job_name(run.name))
    return slurm.submit(work, site, ["python"], **more)


def equals(run: Path, other: Path) -> None:
    """The same metrics, epoch by epoch, and the same last state, bit for bit."""
    assert read_outcome(run)["outcome"] == "finished"
    assert numbers(run) == numbers(other)
    assert_same_state(last(run), last(other))


def begun(run: Path, epochs: int = 1):
    return lambda: len(read_metrics(run)) >= epochs


def test_two_nodes_train_what_two_local_ranks_train(queue, recipe_of, local_run, site_file, tmp_path, capsys):
    """From the command line, with data on the nodes' own disks and a look at everything before."""
    path, run = recipe_of("nodes")
    command = ["slurm", "train", str(path), "--site", str(site_file), "--at", "preflight=true", "--at",
               f"scratch={tmp_path}", "--submit"]
    assert launch(command) == 0
    printed = capsys.readouterr().out
    job = jobs.latest(run)
    assert f"job {job.id}" in printed and f"launch logs {run} --follow" in printed
    assert launch(command) == 2  # one job for each run
    assert f"job {job.id} (" in (error := capsys.readouterr().err) and f"holds {run}" in error
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    equals(run, local_run)
    # What ran, where and with which code is in the run's folder.
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


def test_a_run_comes_back_after_its_time_limit_and_only_so_often(queue, recipe_of, local_run, site_file, slow):
    """The first attempt ends with its time limit, set once it trains: Slurm counts in minutes and looks twice in one.
    The second, the last that is allowed, ends by SIGTERM; what is submitted then ends where an uninterrupted run ends.
    """
    slow.write_text("0.12")  # a minute for its five epochs
    path, run = recipe_of("limit")
    site = load_site(site_file, ["restarts=1", "warn=120"])
    job = submit(path, run, site)
    queue.wait(begun(run), "the first epoch")
    hours, minutes, seconds = map(int, queue.job(job.id)["RunTime"].split(":"))
    limit = (3600 * hours + 60 * minutes + seconds + 75) // 60 + 1
    queue.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}")
    queue.wait(lambda: queue.job(job.id)["Restarts"] == "1", "the requeue at the limit", 200)
    saved = read_outcome(run)
    assert saved["outcome"] == "saved" and saved["step"] > 0, text_of(job)
    slow.write_text("0.02")
    queue.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    queue.wait(lambda: read_outcome(run)["outcome"] == "running", "the second attempt")
    queue.run("scancel", "--signal=TERM", job.id)  # to the step's processes, as a preemption without USR1
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "99:0", "1"), text_of(job)
    assert "back into the queue" in text_of(job) and "at most 1 are allowed" in text_of(job)
    slow.unlink()
    again = submit(path, run, site)
    assert queue.ended(again.id)["JobState"] == "COMPLETED", text_of(again)
    equals(run, local_run)
    assert len(jobs.submitted(run)) == 2


def test_a_node_that_goes_down_ends_the_step_and_the_run_comes_back(queue, recipe_of, local_run, site_file, slow):
    path, run = recipe_of("node")
    job = submit(path, run, load_site(site_file))
    queue.wait(begun(run), "the first epoch")
    queue.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    queue.wait(lambda: queue.job(job.id)["JobState"] == "PENDING", "the requeue", 60)
    slow.unlink()
    queue.run("scontrol", "update", "nodename=n2", "state=resume", check=False)
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert queue.job(job.id)["Restarts"] == "1"
    equals(run, local_run)


@pytest.mark.long
def test_a_node_that_crashes_ends_the_step_and_the_run_comes_back(queue, recipe_of, local_run, site_file, slow):
    """Slurm would notice after five minutes. The other node's ranks fail before that, and the job is put back; again if
    the next attempt gets a signal that was meant for the one before."""
    path, run = recipe_of("crash")
    job = submit(path, run, load_site(site_file))
    queue.wait(begun(run), "the first epoch")
    queue.crash("n2")
    queue.wait(lambda: "a node does not answer; back into the queue" in text_of(job), "the requeue")
    slow.unlink()
    queue.run("slurmd", "-N", "n2")
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert int(queue.job(job.id)["Restarts"]) >= 1
    equals(run, local_run)


def test_ranks_that_are_killed_from_outside_come_back(queue, recipe_of, local_run, site_file, slow):
    """As Slurm does that repeats, to the second attempt's step 0, what it could not tell a crashed node's."""
    path, run = recipe_of("killed")
    job = submit(path, run, load_site(site_file))
    queue.wait(begun(run), "the first epoch")
    queue.run("scancel", "--signal=KILL", f"{job.id}.0")
    queue.wait(lambda: "killed from outside; back into the queue" in text_of(job), "the requeue")
    slow.unlink()
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    assert queue.job(job.id)["Restarts"] == "1"
    equals(run, local_run)


def test_a_run_makes_way_for_a_job_of_higher_priority_and_comes_back(queue, recipe_of, local_run, site_file, slow):
    path, run = recipe_of("low")
    job = submit(path, run, load_site(site_file, ["partition=low"]))
    queue.wait(begun(run), "the first epoch")
    urgent = queue.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
                       "--wrap=sleep 1").strip()
    assert queue.ended(urgent)["JobState"] == "COMPLETED"
    assert read_outcome(run)["outcome"] == "saved", text_of(job)  # within the grace, not killed at its end
    slow.unlink()
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    equals(run, local_run)


def test_a_cancelled_run_stays_away_and_keeps_its_checkpoint(queue, recipe_of, local_run, site_file, slow):
    path, run = recipe_of("cancelled")
    job = submit(path, run, load_site(site_file))
    queue.wait(begun(run), "the first epoch")
    queue.run("scancel", job.id)
    assert queue.ended(job.id)["JobState"] == "CANCELLED"
    time.sleep(2)
    assert queue.job(job.id)["JobState"] == "CANCELLED" and queue.job(job.id)["Restarts"] == "0"
    assert checkpoint.load(checkpoint.newest(run))["epoch"] >= 1
    # launch stop is the polite form: saved, and not put back either
    job = submit(path, run, load_site(site_file))
    queue.wait(lambda: read_outcome(run)["outcome"] == "running" and len(read_metrics(run)) > 1, "the next epoch")
    assert launch(["stop", str(run)]) == 0
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "99:0"), text_of(job)
    assert read_outcome(run)["outcome"] == "saved" and "a stop was requested" in text_of(job)
    slow.unlink()
    job = submit(path, run, load_site(site_file))
    assert queue.ended(job.id)["JobState"] == "COMPLETED", text_of(job)
    equals(run, local_run)


def test_a_run_that_fails_is_not_put_back(queue, recipe_of, site_file, tmp_path):
    """In a folder with a name that a careless script would execute."""
    path, run = recipe_of("fails", optim__lr=1e30, guard__rollbacks=0, run__dir=str(tmp_path / "a b'$(touch PWNED) %j"))
    job = submit(path, run, load_site(site_file, ["nodes=1"]))
    ended = queue.ended(job.id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), text_of(job)
    assert read_outcome(run)["outcome"] == "diverged" and "outcome diverged" in text_of(job)
    assert list(job.path.glob(f"{job.id}-*.log")) and not (Path.cwd() / "PWNED").exists()


def test_a_node_with_a_broken_python_fails_the_job(queue, recipe_of, site_file, tmp_path):
    """The other node's ranks, which wait for it, are ended by srun: that is nobody from outside, and not put back."""
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


def test_what_preflight_finds_wrong_ends_the_job_before_it_trains(queue, recipe_of, site_file):
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
def test_what_the_cluster_does_not_have(two_nodes, recipe_of, site_file, settings, flags, message):
    path, run = recipe_of("misuse")
    with pytest.raises(slurm.InputError) as raised:
        submit(path, run, load_site(site_file, settings, flags))
    assert message in str(raised.value)
    assert not jobs.submitted(run) and not two_nodes.run("squeue", "--noheader").strip()


def test_more_trials_than_an_array_may_have(two_nodes):
    slurm.check_array(100)
    with pytest.raises(slurm.InputError, match="an array of this Slurm has at most 100"):
        slurm.check_array(101)
