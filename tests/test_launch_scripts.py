"""Site files, batch scripts and code snapshots, without submitting. The shell never executes text of a recipe or site.

tests/scripts/ holds what `launch slurm` prints for the recipes and sites in CASES. After an intended change,
`NULSQ_WRITE_SCRIPTS=1 python -m pytest tests/test_launch_scripts.py` rewrites these files; review the difference.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import batch, jobs, slurm, snapshot
from launch.__main__ import main as launch
from launch.job_spec import JobSpec, job_name
from launch.site import Site, load_site
from nulsq.config import load_recipe
from nulsq.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SITES = ROOT / "configs/cluster"
RECIPE, SEARCH = "configs/recipes/imagenet/rn18_w2a2.yaml", "configs/search/imagenet_rn18.yaml"
PLAN = {"name": "imagenet_rn18", "recipe": RECIPE, "studies": ["a", "b"], "trials": 24}
CASES = {
    "train": (JobSpec("train", RECIPE, ["optim.lr=0.1", "--num_bits", "3"], Path("/runs/rn18-0"), Path("data/imagenet"),
                   "rn18-0"), "slurm_8gpu.yaml", {}),
    "search": (JobSpec("search", SEARCH, ["trials=24"], Path("/runs/search-rn18"), Path("data/imagenet"), "search-rn18",
                    PLAN), "slurm_8gpu.yaml", {}),
    "array": (JobSpec("array", SEARCH, ["trials=24"], Path("/runs/search-rn18"), Path("data/imagenet"), "search-rn18",
                   PLAN), "slurm_cpu.yaml", {"trials": 48, "at_once": 8}),
}
needs_shellcheck = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")


def rendered(case: str, **changes) -> str:
    spec, site, arguments = CASES[case]
    site = dataclasses.replace(load_site(SITES / site, ["python=/venv/bin/python"]), **changes)
    folder = spec.directory / "launch/20260101-000000"
    return slurm.script(spec, site, folder, folder.parent / "code-0123456789ab", **arguments)


@pytest.mark.parametrize("case", CASES)
def test_scripts_equal_the_reviewed_ones(case, in_the_checkout):
    path = ROOT / f"tests/scripts/slurm_{case}.sh"
    text = rendered(case)
    if "NULSQ_WRITE_SCRIPTS" in os.environ:
        path.write_text(text)
    assert text == path.read_text()


@needs_shellcheck
@pytest.mark.parametrize("case", CASES)
def test_shellcheck_accepts_the_scripts(case, in_the_checkout):
    text = rendered(case, setup={"modules": "module load cuda/12.8", "venv": "source /venv/bin/activate"})
    # SC1091: a setup line's file is not here. SC2034: each kind of job leaves some variables of the head unused.
    # SC2317: functions that only traps call look unreachable.
    completed = subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC1091,SC2034,SC2317", "-"], input=text,
                               capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout


HOSTILE = ["a b", "it's", '"quoted"', "$(touch PWNED)", "`touch PWNED`", "; touch PWNED", "%j %N", "new\nline", "-rf"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_reaches_the_run_unchanged(text, tmp_path, monkeypatch):
    """The text is in the path, the job name and an override. Bash reads the head of the script and executes nothing."""
    monkeypatch.chdir(tmp_path)
    file, directory = tmp_path / "recipes" / f"{text}.yaml", tmp_path / "runs" / text
    file.parent.mkdir()
    file.write_text("name: x\n")
    spec = JobSpec("train", str(file), [f"name={text}"], directory, Path(text), job_name(text))
    site = Site(environment={"WORD": text.replace("\n", "")}, scratch=None)
    if "\n" in text:
        with pytest.raises(InputError, match="no line breaks"):
            slurm.script(spec, site, directory / "launch/now", directory / "launch/code-0")
        return
    script = slurm.script(spec, site, directory / "launch/now", directory / "launch/code-0")
    head = script.partition("# ---- in every job")[0]
    values = subprocess.run(["bash", "-c", head + 'printf "%s\\0" "$run" "$data" "${arguments[@]}" "$WORD"'],
                            capture_output=True, text=True, cwd=tmp_path).stdout.split("\0")
    assert values[:2] == [str(directory), text] and values[3:5] == [f"name={text}", text]
    assert values[2].endswith(f"/recipes/{text}.yaml") and not (tmp_path / "PWNED").exists()
    flags = [line for line in head.splitlines() if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=[\w.:@%-]+)?", line) for line in flags)
    log = slurm.sbatch(directory / "launch/now")[3]
    assert log == f"--output={str(directory).replace('%', '%%')}/launch/now/%j.log"


@pytest.mark.parametrize(("text", "settings", "flags", "message"), [
    ("kind: slurm\nparttion: gpu", [], [], "Did you mean: 'partition'"),
    ("kind: slrum", [], [], "slrum"),
    ("nodes: 0", [], [], "nodes = 0, allowed: at least 1"),
    ("partition: 'gpu; touch x'", [], [], "partition = 'gpu; touch x' cannot be used"),
    ("account: 'a\nb'", [], [], "account = "),
    ("{}", [], ["qoss=high"], "Did you mean 'qos'"),
    ("{}", [], ["qos=$(x)"], "no spaces, quotes, $ and the like"),
    ("{}", [], ["time=10"], "set hours=... instead"),
    ("{}", [], ["qos"], "allowed: NAME=VALUE"),
    ("environment: {'A B': c}", [], [], "not the name of a variable"),
    ("scratch: tmp", [], [], "the absolute path of a folder"),
    ("hours: 0.01", [], [], "warn = 300 seconds before a limit"),
    ("gpus: 2\nprocesses: 4", [], [], "each rank needs a GPU of its own"),
    ("kind: ray\naddress: head", [], [], "for example http://head:8265"),
    ("{}", ["node=2"], [], "Did you mean one of: 'nodes'"),
])
def test_invalid_site_is_an_error(tmp_path, text, settings, flags, message):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(InputError) as raised:
        load_site(tmp_path / "site.yaml", settings, flags)
    assert message in str(raised.value)


@pytest.mark.parametrize("path", sorted(SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_site_file_loads_and_states_its_command(path):
    site = load_site(path)
    assert f"# run: python -m launch {site.kind} " in path.read_text() and f"--site configs/cluster/{path.name}" in (
        path.read_text())


def test_invalid_command_is_one_error_line_before_submission(tmp_path, monkeypatch, capfd, in_the_checkout):
    recipe, site = str(ROOT / "configs/recipes/digits/w2a2.yaml"), str(SITES / "slurm_cpu.yaml")
    for command, message in [
            (["slurm", "train", recipe, "--submit"], "--site"),
            (["slurm", "train", recipe, "--site", str(tmp_path / "no.yaml")], "no file"),
            (["ray", "train", recipe, "--site", site], "is a site of kind slurm"),
            (["slurm", "train", recipe, "--site", site, "optim.lrr=1"], "Did you mean: 'lr'"),
            (["slurm", "search", "configs/search/demo.yaml", "--site", site, "--at-once", "2"], "--at-once 2: of an"),
            (["stop", str(tmp_path / "none")], "there is no folder"),
            (["status", str(tmp_path), "--fast"], "--fast is not known")]:
        assert launch(command) == 2, command
        error = capfd.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    (tmp_path / "run").mkdir()
    assert launch(["logs", str(tmp_path / "run")]) == 2
    assert "was not submitted anywhere" in capfd.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no sbatch on this machine"):
        slurm.check_cluster(Site())


def test_snapshot_equals_the_checkout_and_is_taken_once(tmp_path):
    first = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == first and len(list(tmp_path.iterdir())) == 1
    for name in ("nulsq/train.py", "tune/search.py", "launch/scripts/begin.sh", "nulsq/quant/op/cpu/cpu.cpp"):
        assert (first / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (first / ".venv").exists() and (first / "SNAPSHOT").read_text().startswith("snapshot of ")
    # Python imports the snapshot's modules, whatever is in the folder in which it starts.
    imported = subprocess.run([sys.executable, "-c", "import launch; print(launch.__file__)"], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"PYTHONPATH": f"{first}:{ROOT}",
                                                                     "PYTHONSAFEPATH": "1"}).stdout
    assert imported.strip() == str(first / "launch/__init__.py")
    recipe = tmp_path / "mine" / "my.yaml"
    recipe.parent.mkdir()
    recipe.write_text("name: x\n")
    assert snapshot.place(first, ROOT / RECIPE) == first / RECIPE
    copy = snapshot.keep(first, recipe)
    assert copy.read_text() == "name: x\n" and copy.parts[-2:] == ("mine", "my.yaml") and copy != recipe


def test_copied_recipe_needs_no_base_file_and_keeps_its_name(tmp_path):
    """The job applies the overrides later. If only the base file changes, there is another copy."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "base.yaml").write_text("optim: {lr: 0.5, epochs: 7}\nquant: {bits: 3}\n")
    recipe = tmp_path / "mine" / "my.yaml"
    recipe.write_text("base: ../base.yaml\nquant: {bits: 2}\n")
    before = load_recipe(recipe, ["optim.epochs=9"])
    copy = snapshot.keep(tmp_path / "run" / "code-0", recipe)
    (tmp_path / "base.yaml").write_text("optim: {lr: 0.25}\n")
    assert snapshot.place(tmp_path / "run" / "code-0", recipe) != copy
    (tmp_path / "base.yaml").unlink()
    assert load_recipe(copy, ["optim.epochs=9"]) == before and before.name == "mine-my"


def test_recipe_of_the_checkout_is_resolved_in_the_snapshot(tmp_path, monkeypatch):
    """The base of a recipe may be missing from the snapshot, here because it is outside the checkout."""
    checkout = tmp_path / "checkout"
    (checkout / "configs").mkdir(parents=True)
    (tmp_path / "base.yaml").write_text("quant: {bits: 3}\n")
    (checkout / "configs" / "my.yaml").write_text("base: ../../base.yaml\n")
    monkeypatch.setattr(snapshot, "ROOT", checkout)
    snapshot._listed.cache_clear()
    try:
        code = snapshot.take(tmp_path / "run")
        copy = snapshot.keep(code, checkout / "configs" / "my.yaml")
    finally:
        snapshot._listed.cache_clear()
    assert copy == code / "configs" / "my.yaml" and "base" not in copy.read_text()
    assert load_recipe(copy).quant.bits == 3


def test_run_folder_records_its_jobs(tmp_path):
    run = tmp_path / "run"
    folders = [jobs.open_folder(run) for _ in range(2)]
    assert folders[0] != folders[1]
    for number, folder in enumerate(folders):
        jobs.write(jobs.Job("slurm", str(number), str(run), str(folder), submitted=f"2026-01-0{number + 1}"))
    assert jobs.latest(run).id == "1"
    jobs.request_stop(jobs.latest(run))
    assert (run / "launch" / jobs.STOP).is_file()
    with pytest.raises(InputError, match=r"job 0 \(RUNNING\) holds"):
        jobs.check_free(run, "slurm", lambda job: "RUNNING")
    jobs.check_free(run, "slurm", lambda job: jobs.ENDED)
    from nulsq.run.directory import lock_folder
    with lock_folder(run, "training"), pytest.raises(InputError, match="another process"):
        jobs.check_free(run, "slurm", lambda job: jobs.ENDED)
    jobs.open_folder(run)
    assert not (run / "launch" / jobs.STOP).exists()  # a new submission removes the earlier stop request


@pytest.mark.parametrize(("text", "kind", "expected"), [
    ("gpu:8", None, 8), ("gpu:h100:8(S:0-1)", None, 8), ("gpu:h100:8(S:0-1),shard:32", "h100", 8),
    ("gpu:a100:4,gpu:h100:2", "h100", 2), ("gpu:a100:4", "h100", 0), ("(null)", None, 0)])
def test_gpu_count_is_parsed_from_slurm_resources(text, kind, expected):
    assert slurm._gpus(text, kind) == expected


@pytest.mark.parametrize(("text", "minutes"), [("infinite", float("inf")), ("1-00:00:00", 1440), ("12:30:00", 750),
                                               ("30:00", 30), ("n/a", float("inf"))])
def test_time_limit_of_slurm_is_parsed_to_minutes(text, minutes):
    assert slurm._minutes(text) == minutes


def test_different_jobs_choose_different_ports(capsys):
    import socket
    first = batch.port("cluster-17-0")
    assert len({batch.port(f"cluster-{job}-0") for job in range(50)}) > 45
    with socket.create_server(("", first + 1)):
        assert abs(batch.port("cluster-17-0") - first) > 100 * batch.STEP
    assert batch.main(["outcome", "/nowhere"]) == 1 and "/nowhere" in capsys.readouterr().err
    assert batch.address("127.0.0.1") == "127.0.0.1"
