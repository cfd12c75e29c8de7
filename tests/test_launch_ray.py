"""Ray jobs: what is submitted, what is refused, and complete jobs on a real cluster with a token.

The cluster is a head without cores and two nodes of one core each, in separate processes on this machine. Except for
the dashboard it listens on all interfaces, as Ray does; the token keeps others out.
"""

import http.server
import importlib.util
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from launch import jobs, ray_client, ray_jobs
from launch.__main__ import main as launch
from launch.job_spec import JobSpec, setting
from launch.site import Site
from nulsq.config import to_yaml
from nulsq.errors import InputError
from nulsq.run.directory import read_metrics
from nulsq.run.status import read_outcome

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "a b'$(touch x)"
pytestmark = [pytest.mark.usefixtures("in_the_checkout"),
              pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")]


@pytest.fixture(autouse=True)
def no_token(monkeypatch, tmp_path):
    """Hide the user's own tokens and cluster address."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def spec_of(folder: Path, name: str = "run", **changes) -> JobSpec:
    """The JobSpec of a run that exists only as a recipe file."""
    (folder / "recipes").mkdir(exist_ok=True)
    file = folder / "recipes" / "recipe.yaml"
    file.write_text("name: x\n")
    return JobSpec(**{"verb": "train", "file": str(file), "rest": ["optim.lr=0.1"], "directory": folder / name,
                      "data": folder / "data", "name": "run"} | changes)


# ---- what is submitted


def test_shown_submission_is_complete_and_writes_nothing(tmp_path):
    spec = spec_of(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    shown = ray_jobs.shown(spec, Site(kind="ray", cpus=4, gpus=2, warn=60)).splitlines()
    words = shlex.split(shown[0])
    assert words[:3] == ["exec", "env", f"--chdir={ROOT}"] and "OMP_NUM_THREADS=2" in words
    assert words[words.index("--nproc-per-node") + 1] == "2" and words[words.index("--shutdown-timeout") + 1] == "60"
    assert words[-3] == "nulsq.train" and words[-1] == "optim.lr=0.1"
    assert json.loads(shown[1].removeprefix("# submitted with ")) == {
        "submission_id": "run-TIME", "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}},
        "entrypoint_num_cpus": 4, "entrypoint_num_gpus": 2}
    assert "http://127.0.0.1:8265, without a token" in shown[2] and "4 CPU and 2 GPU" in shown[2]
    assert before == sorted(tmp_path.rglob("*"))


def test_shell_executes_no_text_of_a_ray_job(tmp_path, monkeypatch):
    """A shell reads the entrypoint, as in Ray. The folder and the settings contain shell commands; none is executed."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\npwd; env | grep PYTHONPATH\nfor word in "$@"; do echo "<$word>"; done\n'
                      "kill -TERM $$\n")
    python.chmod(0o755)
    spec = spec_of(folder, HOSTILE, rest=["name=`touch x`", "model.name=$HOME;touch x", setting("run.dir", folder)])
    site = Site(kind="ray", python=str(python), setup={"one": "export SET=up", "two": "echo $SET"})
    words = ray_jobs.entrypoint(spec, site, folder / "code", {})
    process = subprocess.Popen(shlex.join(words), shell=True, stdout=subprocess.PIPE, text=True, cwd="/")
    lines = process.communicate()[0].splitlines()
    assert process.returncode == -signal.SIGTERM  # the shell is replaced by the run, so that signals reach it
    assert lines[:3] == ["up", str(folder), f"PYTHONPATH={folder / 'code'}:{folder}"]
    assert lines[-3:] == [f"<{word}>" for word in spec.rest]
    assert not list(tmp_path.rglob("x"))


def test_search_entrypoint_states_address_nodes_recipe_and_name(tmp_path):
    spec = spec_of(tmp_path, verb="search", plan={"name": "tiny", "recipe": "configs/recipes/digits/w2a2.yaml"})
    submission = ray_jobs.submission(spec, Site(kind="ray", nodes=3), "id", tmp_path / "code")
    words = shlex.split(submission["entrypoint"])
    assert words[-4:] == [setting("recipe", tmp_path / "code/configs/recipes/digits/w2a2.yaml"), 'name="tiny"',
                          "address=auto", "nodes=3"]
    assert "RAY_OVERRIDE_JOB_RUNTIME_ENV=1" in words and not any("entrypoint_num" in key for key in submission)
    assert "working_dir" not in submission["runtime_env"]
    submission = ray_jobs.submission(spec, Site(kind="ray", code="ship"), "id", tmp_path / "code")
    words = shlex.split(submission["entrypoint"])
    assert submission["runtime_env"]["working_dir"] == f"{tmp_path}/code"
    assert not any(word.startswith("--chdir") for word in words)
    assert re.fullmatch(r"files-\w{12}/recipes/recipe.yaml", words[words.index("tune.search") + 1])
    assert setting("recipe", "configs/recipes/digits/w2a2.yaml") in words


# ---- what is refused


@pytest.mark.parametrize(("site", "spec", "message"), [
    ({"code": "ship"}, {"directory": Path("runs/x")}, "run.dir = runs/x: with code = ship"),
    ({"code": "ship"}, {"data": Path("data/x")}, "data.path = data/x: with code = ship"),
    ({"code": "ship"}, {"directory": Path("runs/x"), "verb": "search"}, "dir = runs/x: with code = ship"),
    ({"nodes": 2}, {}, "nodes = 2: a run is on one node"),
    ({"partition": "gpu"}, {}, "partition: a setting of Slurm jobs"),
    ({"scratch": "/tmp"}, {}, "scratch: a setting of Slurm jobs"),
    ({"token": "/no/such"}, {}, "token = /no/such: cannot be read (No such file or directory)"),
    ({"token": "/dev/null"}, {}, "token = /dev/null: holds no token"),
    ({"address": "http://127.0.0.1:9"}, {}, "address = http://127.0.0.1:9: no jobs API answers there"),
])
def test_invalid_submission_is_refused_and_writes_nothing(tmp_path, site, spec, message):
    spec = spec_of(tmp_path, **spec)
    with pytest.raises(InputError) as raised:
        ray_jobs.submit(spec, Site(kind="ray", **site), [])
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_site_of_another_kind_error_names_the_right_command(tmp_path, capsys):
    (tmp_path / "site.yaml").write_text("kind: slurm\n")
    assert launch(["ray", "train", "x.yaml", "--site", str(tmp_path / "site.yaml")]) == 2
    assert "of kind slurm: use it with python -m launch slurm train" in capsys.readouterr().err


def test_missing_ray_error_names_the_extra(tmp_path, monkeypatch):
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "ray":
                raise ModuleNotFoundError(name=name)

    for name in ("ray", "ray.job_submission"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Hide(), *sys.meta_path])
    with pytest.raises(InputError, match=r"pip install 'nulsq\[search\]'"):
        ray_jobs.submit(spec_of(tmp_path), Site(kind="ray"), [])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def serve():
    """serve({path: (status, text)}): start a server with these answers on loopback, and return its address."""
    servers = []

    def start(answers):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, text = answers.get(self.path, (404, ""))
                if status is None:  # never answers
                    time.sleep(2)
                    return
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(("answer", "message"), [
    ((200, "<html>"), "something answers there, but not the jobs API"),
    ((200, "[]"), "something answers there, but not the jobs API"),
    ((404, ""), "something answers there, but not the jobs API"),
    ((200, "{}"), "something answers there, but not the jobs API"),
    ((200, '{"ray_version": "1.8.0"}'), "Ray version 1.8.0 is running on the cluster"),
    ((500, "Traceback\nValueError: no\n"), "its jobs API fails (500: ValueError: no)"),
    ((401, ""), "it demands a token, looked for in the site's `token`, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/"),
    ((None, ""), "no jobs API answers there (HTTPConnectionPool(host='127.0.0.1', "),
])
def test_connection_error_names_the_address_and_the_answer(tmp_path, serve, monkeypatch, answer, message):
    monkeypatch.setattr(ray_client, "SECONDS", 0.5)
    # The site's address is used, whatever RAY_ADDRESS says.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(InputError) as raised:
        ray_jobs.submit(spec_of(tmp_path), Site(kind="ray", address=serve({"/api/version": answer})), [])
    assert message in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_directory_held_by_a_job_is_refused(tmp_path, serve):
    address = serve({"/api/version": (200, '{"ray_version": "2.60.0"}'),
                     "/api/jobs/one": (200, '{"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x"}')})
    spec, site = spec_of(tmp_path), Site(kind="ray", address=address)
    folder = jobs.open_folder(spec.directory)
    running = jobs.Job("ray", "one", str(spec.directory), str(folder), site=vars(site))
    jobs.write(running)
    with pytest.raises(InputError, match=r"job one \(RUNNING\) holds .*/run; python -m launch stop"):
        ray_jobs.submit(spec, site, [])
    # A cluster that was restarted or is gone does not block the directory forever.
    unknown = jobs.Job("ray", "two", str(spec.directory), str(folder), site=vars(site))
    assert ray_jobs.state(unknown) == jobs.ENDED
    unreachable = jobs.Job("ray", "one", str(spec.directory), str(folder),
                           site=vars(site) | {"address": "http://127.0.0.1:9"})
    assert ray_jobs.state(unreachable).startswith("unknown (address = http://127.0.0.1:9: no jobs API")
    jobs.check_free(spec.directory, "ray", lambda _: ray_jobs.state(unreachable))


# ---- a real cluster

CLUSTER = """
import socket, sys
from ray.cluster_utils import Cluster
with socket.socket() as first, socket.socket() as second:  # Ray's defaults are fixed ports, the same for every cluster
    first.bind(("127.0.0.1", 0)), second.bind(("127.0.0.1", 0))
    ports = [bound.getsockname()[1] for bound in (first, second)]
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": ports[0],
    "dashboard_agent_listen_port": ports[1]})
try:
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    print(cluster.head_node.webui_url, flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The cluster's address, and a folder with its `token`. Jobs are slow while a file `slow` exists in the folder."""
    folder = tmp_path_factory.mktemp("cluster")
    with os.fdopen(os.open(folder / "token", os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
                                "NULSQ_TEST_SLOW": str(folder / "slow"), "CUDA_VISIBLE_DEVICES": "",
                                # Ray's own limits are too short for a busy machine.
                                "RAY_raylet_start_wait_time_s": "120", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "240",
                                "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "120"}
    with (folder / "log").open("w") as log, subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE,
                                                             stdout=subprocess.PIPE, stderr=log, text=True,
                                                             env=environment) as process:
        address = process.stdout.readline().strip()
        assert address, (folder / "log").read_text()[-3000:]
        yield f"http://{address}", folder
        process.stdin.close()


@pytest.fixture
def site_file(cluster, tmp_path):
    (tmp_path / "site.yaml").write_text(f"kind: ray\naddress: {cluster[0]}\ntoken: {cluster[1]}/token\nwarn: 60\n")
    return tmp_path / "site.yaml"


@pytest.fixture
def slow(cluster):
    """The file that makes jobs slow; the test or the fixture removes it."""
    (cluster[1] / "slow").touch()
    yield cluster[1] / "slow"
    (cluster[1] / "slow").unlink(missing_ok=True)


def wait_until(condition, message, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.2)


def log_of(directory) -> str:
    completed = subprocess.run([sys.executable, "-m", "launch", "logs", str(directory)], capture_output=True, text=True)
    return completed.stdout + completed.stderr


def has_ended(directory) -> bool:
    return ray_jobs.state(jobs.latest(directory)) == jobs.ENDED


@pytest.mark.ray
@pytest.mark.slow
def test_client_without_the_token_is_refused(cluster, tmp_path, monkeypatch):
    address, folder = cluster
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"{address}/api/jobs/")
    assert raised.value.code == 401
    (tmp_path / "wrong").write_text("0" * 64)
    site = Site(kind="ray", address=address)
    for token, message in ((None, "it demands a token"), (str(tmp_path / "wrong"), "it refuses the token")):
        with pytest.raises(InputError) as raised:
            ray_client.connect(Site(kind="ray", address=address, token=token))
        assert message in str(raised.value) and "name the file in the site's `token`" in str(raised.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    assert isinstance(ray_client.connect(site).list_jobs(), list)


@pytest.mark.ray
@pytest.mark.slow
def test_search_outlives_its_client_and_resumes_after_a_stop(cluster, site_file, slow, short, float_run, tmp_path,
                                                             capsys):
    recipe = short("trial", model__init_from=str(float_run), optim__epochs=3,
                   quant__activation__quantizer="tests.slowed")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    (tmp_path / "tiny.yaml").write_text(f"""
recipe: {tmp_path}/recipe.yaml
dir: {tmp_path}/out
studies: {{bits: {{key: quant.bits, values: [2]}}}}
space: {{lr: {{key: optim.lr, sample: loguniform, low: 1e-3, high: 0.1}}}}
trials: 2
repeats: 0
""")
    out = tmp_path / "out"
    command = ["ray", "search", str(tmp_path / "tiny.yaml"), "--site", str(site_file), "--at", "nodes=3", "--submit"]
    assert launch(command) == 0
    assert f"follow   python -m launch logs {out} --follow" in capsys.readouterr().out
    with subprocess.Popen([sys.executable, "-m", "launch", "logs", str(out), "--follow"], stdout=subprocess.PIPE,
                          text=True) as client:
        for line in client.stdout:
            if "Ray is up" in line:
                break
        client.kill()
    assert "2 trials fit at once" in line
    wait_until(lambda: list(out.glob("trials/*/*/metrics.jsonl")), lambda: log_of(out))
    with pytest.raises(InputError, match=r"\(RUNNING\) holds"):
        jobs.check_free(out, "ray", ray_jobs.state)

    assert launch(["stop", str(out)]) == 0
    assert "it saves and stops within 60 seconds" in capsys.readouterr().out
    wait_until(lambda: has_ended(out), lambda: log_of(out))
    assert launch(["logs", str(out)]) == 0
    assert "interrupted; the same command continues the search" in capsys.readouterr().out
    saved = {path: read_metrics(path.parent) for path in out.glob("trials/*/*/metrics.jsonl")}
    assert saved and not (out / "finished").exists()

    slow.unlink()
    assert launch([*command, "--follow"]) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "winner's test top-1" in printed and "succeeded" in printed
    assert (out / "finished").exists() and len(list(out.glob("trials/*/*/outcome.json"))) == 2
    for path, lines in saved.items():
        assert read_metrics(path.parent)[:len(lines)] == lines  # resumed: even the recorded times are unchanged
    assert [job.place for job in jobs.submitted(out)] == ["ray", "ray"]


@pytest.mark.ray
@pytest.mark.long
def test_stopped_run_of_two_ranks_resumes_with_shipped_code(
        cluster, site_file, slow, short, float_run, tmp_path, capsys):
    """Ray signals all processes of the job, and torchrun forwards its signal: they count as one request. The run's
    folder has a hostile name. The recipe is outside the checkout, in a folder `build`, which .gitignore excludes."""
    run = tmp_path / HOSTILE
    recipe = short("ranks", model__init_from=str(float_run), optim__epochs=3,
                   quant__activation__quantizer="tests.slowed")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "recipe.yaml").write_text(to_yaml(recipe))
    command = ["ray", "train", str(tmp_path / "build" / "recipe.yaml"), setting("run.dir", run), "--site",
               str(site_file), "--at", "processes=2", "--submit"]
    assert launch(command) == 0, capsys.readouterr()
    wait_until(lambda: read_metrics(run), lambda: log_of(run))
    assert launch(["status", str(run)]) == 0
    printed = capsys.readouterr().out
    assert ": RUNNING\n" in printed and "outcome: running" in printed
    assert launch(["stop", str(run)]) == 0
    wait_until(lambda: has_ended(run), lambda: log_of(run))
    assert read_outcome(run)["outcome"] == "saved", log_of(run)
    before = read_metrics(run)
    assert len(before) < 3

    slow.unlink()
    assert launch([*command, "--follow", "--at", "code=ship", "--at", f"python={sys.executable}"]) == 0, \
        capsys.readouterr()
    assert "epoch 3/3" in capsys.readouterr().out
    assert read_outcome(run)["outcome"] == "finished" and read_metrics(run)[:len(before)] == before
    job = jobs.latest(run)
    shipped = ray_client.connect(Site(**job.site)).get_job_info(job.id)
    assert shipped.runtime_env["working_dir"].startswith("gcs://") and "files-" in shipped.entrypoint
    assert (run / "code.txt").read_text().count("snapshot of") == 2
    assert not (ROOT / "x").exists() and not list(tmp_path.rglob("x"))
