"""Preflight on real ranks and process groups: each problem is a line that names it and an exit code, never a hang."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.preflight.__main__ import main
from launch.preflight.rank_store import RankStore, RankTimeout, is_hanging, run_with_timeout
from nulsq.config import to_yaml
from nulsq.errors import ExitCode
from tests.runs import in_ranks

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--read-seconds", "0.2"]
NAMES = ["devices", "versions", "collective", "data", "disk"]


@pytest.fixture
def recipe_file(short, tmp_path):
    recipe = short("looked_at", run__root=str(tmp_path / "runs"))
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    return path


def report_of(path: Path) -> tuple[dict, dict[str, dict]]:
    content = json.loads(path.read_text())
    return content, {check["check"]: check for check in content["checks"]}


def test_all_checks_pass_on_two_healthy_ranks(recipe_file, tmp_path):
    completed = in_ranks(2, "launch.preflight", str(recipe_file), "optim.lr=0.1", "--num_bits", "3", "--devices", "0",
                         "--disk", "0.001", "--bandwidth", "1e-6", "--images-per-second", "1", "--report",
                         str(tmp_path / "report.json"), *QUICK)
    assert completed.returncode == 0, completed.stdout + completed.stderr[-3000:]
    lines = completed.stdout.splitlines()
    assert "2 ranks on" in lines[0] and lines[-1] == "all 5 checks ok" and len(lines) == 7
    assert [line.split()[:2] for line in lines[1:-1]] == [["ok", name] for name in NAMES]
    content, checks = report_of(tmp_path / "report.json")
    assert content["ok"] and len(content["nodes"]) == 2 and list(checks) == NAMES
    assert f"torch {torch.__version__}" in checks["versions"]["found"] and "data set" in checks["versions"]["found"]
    assert checks["collective"]["measured"]["bus_gigabytes_per_second"] > 0 and "gloo" in checks["collective"]["found"]
    assert checks["data"]["measured"]["images_per_second"] > 1 and checks["data"]["measured"]["bytes_per_second"] > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "report.json"]


def test_all_failed_checks_are_reported(recipe_file, tmp_path):
    """Every check is made and reported, although others have failed before it."""
    # Two ranks that claim to be different nodes; one has another version of the package, as with a stale copy.
    (tmp_path / "other").mkdir()
    script = tmp_path / "other" / "as_two_nodes.py"
    script.write_text("""
import os, sys
os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"
from launch.preflight.rank_store import exit_process
from launch.preflight.__main__ import main
import nulsq, launch.preflight.probe
if os.environ["RANK"] == "1":
    nulsq.__version__ = "0.0.9"
exit_process(main(sys.argv[1:]))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(script), str(recipe_file),
               "--devices", "8", "--bandwidth", "1e6", "--disk", "1e9", "--images-per-second", "1e12", "--report",
               str(tmp_path / "report.json"), *QUICK]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert completed.returncode == 1, completed.stdout + completed.stderr[-3000:]  # the exit code of torchrun
    content, checks = report_of(tmp_path / "report.json")
    assert not content["ok"] and content["nodes"] == ["node0", "node1"]
    assert [name for name in NAMES if not checks[name]["ok"]] == NAMES
    assert completed.stdout.splitlines()[-1] == f"FAILED: {', '.join(NAMES)}"
    assert checks["devices"]["asked"] == "8 GPUs on each node"
    assert "on node0, node1" in checks["devices"]["found"] and "no GPU for rank 0 (node0), rank 1" in \
        checks["devices"]["found"] or torch.cuda.is_available()
    assert checks["versions"]["found"].startswith("nulsq: ") and "0.0.9 on node1" in checks["versions"]["found"]
    assert "at 1e+06 GB/s" in checks["collective"]["asked"] and "GB/s bus bandwidth" in checks["collective"]["found"]
    assert "the slowest is rank" in checks["data"]["found"]
    assert "1e+09 GB" in checks["disk"]["asked"] and "GB and" in checks["disk"]["found"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "recipe.yaml", "report.json"]


def test_single_process_reports_a_failed_check_and_leaves_nothing_behind(recipe_file, tmp_path, capsys):
    """A missing data set gives exit code 4. No run folder is made; no process group and no thread are left."""
    assert main([str(recipe_file), *QUICK]) == 0
    assert "a single rank" in capsys.readouterr().out
    code = main([str(recipe_file), f"data.path={tmp_path}", "--report", str(tmp_path / "report.json"), *QUICK])
    assert code == ExitCode.PREFLIGHT_FAILED
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("FAILED  ")] == ["data"]
    assert "is not a prepared data set" in printed[-3] and printed[-1] == "FAILED: data"
    assert not report_of(tmp_path / "report.json")[0]["ok"]
    assert not (tmp_path / "runs").exists() and not dist.is_initialized() and not is_hanging()


def test_unwritable_folder_fails_the_disk_check(recipe_file, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    # root may write everywhere except in /proc
    closed = Path("/proc") if os.access(tmp_path / "closed", os.W_OK) else tmp_path / "closed"
    assert main([str(recipe_file), f"run.root={closed}/runs", *QUICK]) == ExitCode.PREFLIGHT_FAILED
    printed = capsys.readouterr().out
    assert "FAILED: disk" in printed and f"{closed}/.preflight" in printed


def test_disk_check_leaves_the_run_folder_unchanged(recipe_file, tmp_path):
    """Before the run starts, only launch/ may be in its folder: the test file is written there and then removed."""
    launch = tmp_path / "run" / "launch"
    launch.mkdir(parents=True)
    assert main([str(recipe_file), f"run.dir={tmp_path / 'run'}", "--report", str(tmp_path / "r.json"), *QUICK]) == 0
    assert f"written to {launch}" in report_of(tmp_path / "r.json")[1]["disk"]["found"]
    assert list((tmp_path / "run").iterdir()) == [launch] and not list(launch.iterdir())


@pytest.mark.parametrize(("arguments", "message"), [
    (["optim.lrr=1"], "Did you mean: 'lr'"), (["--disks", "1"], "Did you mean '--disk'"),
    (["--devices", "-1"], "--devices = -1, allowed: at least 0"), (["--timeout", "0"], "--timeout = 0, allowed: above"),
    (["--disk", "nan"], "--disk = nan"), (["--report", "/no/such/folder/r.json", *QUICK], "cannot be written"),
])
def test_invalid_argument_is_one_error_line(recipe_file, capsys, arguments, message):
    assert main([str(recipe_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_function_that_hangs_returns_a_timeout_error():
    event = threading.Event()
    assert run_with_timeout(0.1, event.wait) == {"error": "no answer within 0.1 s"} and is_hanging()
    event.set()
    deadline = time.monotonic() + 10
    while is_hanging() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_hanging() and run_with_timeout(10, lambda: {"found": 1}) == {"found": 1}
    assert run_with_timeout(10, lambda: {}["x"]) == {"error": "KeyError: 'x'"}


def test_missing_rank_is_named(monkeypatch):
    """The two ranks are threads that share a real store. Rank 1 does not take part in the second exchange."""
    monkeypatch.setattr("launch.preflight.rank_store.SLACK", 0.5)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    errors = {}

    def run(rank):
        ranks = RankStore()
        ranks.rank, ranks.size = rank, 2
        ranks.store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        ranks.nodes = ranks.all_gather("node", f"node{rank}", 20)
        if rank == 0:
            try:
                ranks.all_gather("more", {}, 0.5)
            except RankTimeout as timeout:
                errors[rank] = str(timeout)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == {0: "no answer from rank 1 (node1) within 1 s (more)"}
