"""Searches on a real Slurm of two nodes: on a Ray cluster that the job starts, interrupted and resumed, two at a time;
and as an array of trials without Ray."""

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from launch import jobs, slurm
from launch.__main__ import main as launch
from launch.job_spec import JobSpec
from launch.site import Site
from nulsq.config import to_yaml
from nulsq.run.directory import read_metrics
from nulsq.run.status import read_outcome
from tests.slurm_cluster import text_of

pytest.importorskip("ray")
# The waits inside these tests have their own time limits, whose messages say what was awaited.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def search_file(short, float_run, tmp_path):
    """search_file(name, **recipe_settings): file and folder of a search with one study of two trials."""
    def make(name, **overrides):
        (tmp_path / f"{name}-recipe.yaml").write_text(to_yaml(short(
            f"{name}-trial", model__init_from=str(float_run), **{"optim__epochs": 3} | overrides)))
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"""
recipe: {tmp_path}/{name}-recipe.yaml
dir: {tmp_path}/{name}
studies: {{bits: {{key: quant.bits, values: [2]}}}}
space: {{lr: {{key: optim.lr, sample: loguniform, low: 0.001, high: 0.1}}}}
trials: 2
grace: {overrides.get('optim__epochs', 3)}
""")
        return path, tmp_path / name
    return make


@pytest.fixture
def site_file(tmp_path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("kind: slurm\nhours: 0.5\nwarn: 30\npreflight: false\n")
    return path


def submit(file: Path, directory: Path, site: Site, verb: str = "search", **more) -> jobs.Job:
    """Submit as `launch slurm search --submit` does, but skip the check that runs in a subprocess."""
    plan = {"name": file.stem, "recipe": str(file.with_name(f"{file.stem}-recipe.yaml")), "studies": ["2"], "trials": 2}
    return slurm.submit(JobSpec(verb, str(file), [], directory, Path("unused"), directory.name, plan), site, ["python"],
                        **more)


def test_two_searches_run_at_once_and_an_interrupted_one_resumes(two_nodes, search_file, slow):
    """Two Ray clusters on the same two nodes share neither ports nor folders nor tokens. The first is interrupted."""
    site = Site(nodes=2, hours=0.5, warn=30, preflight=False, restarts=2)
    first_file, first_folder = search_file("first", quant__activation__quantizer="tests.slowed", optim__epochs=5)
    second_file, second_folder = search_file("second")
    first_job, second_job = submit(first_file, first_folder, site), submit(second_file, second_folder, site)
    run = first_folder / "trials/2/000"
    two_nodes.wait(lambda: len(read_metrics(run)) >= 1, "the first epoch of a trial")
    token = first_job.path / f"token-{first_job.id}"
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() not in (first_job.path / "job.sh").read_text()
    assert token.read_text() not in (first_job.path / f"environment-{first_job.id}.txt").read_text()
    head = next(first_job.path.glob("*-ray-head-*.log")).read_text()
    dashboard = re.search(r"127\.0\.0\.1:\d+", head).group()
    with pytest.raises(urllib.error.HTTPError) as raised:  # it listens on loopback, and denies access without the token
        urllib.request.urlopen(f"http://{dashboard}/api/jobs/")
    assert raised.value.code == 401
    two_nodes.run("scancel", "--signal=USR1", "--batch", first_job.id)
    two_nodes.wait(lambda: two_nodes.job(first_job.id)["Restarts"] == "1", "the requeue", 90)
    two_nodes.wait(lambda: not two_nodes.left(first_job.id), "the end of its Ray", 30)
    assert "back into the queue" in text_of(first_job) and not token.exists()
    metrics_before = read_metrics(run)
    slow.unlink()
    for job in (second_job, first_job):
        assert two_nodes.ended(job.id)["JobState"] == "COMPLETED", text_of(job) + two_nodes.describe()
    for folder in (first_folder, second_folder):
        assert (folder / "finished").is_file() and (folder / "report/index.html").is_file()
        assert {read_outcome(path.parent)["outcome"] for path in folder.glob("trials/*/*/recipe.yaml")} == {"finished"}
    assert read_metrics(run)[:len(metrics_before)] == metrics_before  # resumed: even the recorded times are unchanged
    events = map(json.loads, (first_folder / "events.jsonl").open())
    assert len([event for event in events if event["event"] == "session"]) == 2
    two_nodes.wait(lambda: not two_nodes.left(first_job.id) + two_nodes.left(second_job.id), "the end of both Rays", 30)
    assert "snapshot of" in (run / "code.txt").read_text()  # trials, too, run the code as it was at submission


@pytest.mark.long
def test_job_fails_when_a_ray_process_dies(two_nodes, search_file, slow):
    """When a Ray process dies, the search is stopped and the job fails with the reason instead of waiting forever. When
    the Slurm step is killed from outside, the job is requeued."""
    file, directory = search_file("dies", quant__activation__quantizer="tests.slowed", optim__epochs=50)
    job = submit(file, directory, Site(nodes=2, hours=0.5, warn=30, preflight=False))
    two_nodes.wait(lambda: list(directory.glob("trials/*/*/metrics.jsonl")), "the first epoch of a trial")
    steps = two_nodes.run("squeue", "--noheader", "--steps", f"--jobs={job.id}", "--format=%i %j").splitlines()
    two_nodes.run("scancel", "--signal=KILL", next(step.split()[0] for step in steps if "ray-nodes" in step))
    two_nodes.wait(lambda: "killed from outside; back into the queue" in text_of(job), "the requeue")
    def raylets():
        return [int(process.name) for process in two_nodes.processes("SLURMD_NODENAME=n2")
                if (process / "comm").read_text() == "raylet\n"]

    two_nodes.wait(lambda: "restart 1" in text_of(job) and raylets(), "the second attempt's Ray")
    time.sleep(5)
    for process in raylets():
        os.kill(process, signal.SIGKILL)
    ended = two_nodes.ended(job.id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), text_of(job)
    assert text_of(job).count("a part of Ray has ended") == 2


def test_array_trains_the_trials_without_ray(two_nodes, search_file, site_file, capsys):
    """Submitted from the command line; the task whose trial diverges is not requeued."""
    file, directory = search_file("array", optim__epochs=2)
    assert launch(["slurm", "search", str(file), "points={mad: {lr: 1e12}}", "space.lr.high=1e13", "--site",
                   str(site_file), "overrides={guard.rollbacks: 0}", "--array", "--at-once", "2", "--submit"]) == 0
    job = jobs.latest(directory)
    assert f"job {job.id}" in capsys.readouterr().out
    two_nodes.wait(lambda: slurm.state(job) == jobs.ENDED, "the end of the array")
    outcomes = [read_outcome(directory / f"trials/2/{number:03d}")["outcome"] for number in (0, 1)]
    assert outcomes == ["diverged", "finished"], text_of(job)
    assert not list(directory.glob("trials/*/*/test.json"))  # no trial is evaluated on test before the selection
    assert launch(["status", str(directory)]) == 0
    printed = capsys.readouterr().out
    assert f"slurm job {job.id}" in printed


def test_interrupted_array_tasks_are_requeued(two_nodes, search_file, site_file, slow):
    """Both tasks are interrupted at once: the last task's job id is that of the array, so one signal reaches all."""
    file, directory = search_file("tasks", quant__activation__quantizer="tests.slowed", optim__epochs=4)
    assert launch(["slurm", "search", str(file), "--site", str(site_file), "--array", "--submit"]) == 0
    job = jobs.latest(directory)
    runs = [directory / f"trials/2/{number:03d}" for number in (0, 1)]
    two_nodes.wait(lambda: all(len(read_metrics(run)) >= 1 for run in runs), "the first epoch of both")
    two_nodes.run("scancel", "--signal=USR1", "--batch", job.id)
    two_nodes.wait(lambda: text_of(job).count("back into the queue") == 2, "both requeues", 90)
    assert [read_outcome(run)["outcome"] for run in runs] == ["saved", "saved"]
    metrics_before = [read_metrics(run) for run in runs]
    slow.unlink()
    two_nodes.wait(lambda: slurm.state(job) == jobs.ENDED, "the end of the array")
    assert text_of(job).count("restart 1 of at most") == 2
    for run, earlier in zip(runs, metrics_before, strict=True):
        assert read_outcome(run)["outcome"] == "finished", text_of(job)
        assert read_metrics(run)[:len(earlier)] == earlier and len(read_metrics(run)) == 4
