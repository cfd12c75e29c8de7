"""Jobs of a Slurm cluster: the script that sbatch gets, and what happens to a submitted job.

A script is a head (#SBATCH lines and the job's own values, each quoted) and the text of launch/scripts/: signals.sh,
the site's setup lines, begin.sh, then train.sh or ray.sh. Paths go to sbatch on its command line, which no shell reads.
These scripts also handle a run that comes back after a time limit, a preemption or a dead node.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from launch import jobs, snapshot
from launch.job_spec import JobSpec, check_plain, setting
from launch.jobs import ENDED, Job
from launch.site import Site
from nulsq.errors import InputError
from nulsq.run.directory import LAUNCH

SCRIPTS = Path(__file__).resolve().parent / "scripts"
PARTS = {"train": ["begin.sh", "train.sh"], "array": ["array.sh", "begin.sh", "train.sh"],
         "search": ["begin.sh", "ray.sh"]}
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED", "PREEMPTED", "REQUEUE_HOLD",
          "STOPPED", "SIGNALING")  # states of a job that has not ended


def script(spec: JobSpec, site: Site, folder: Path, code: Path, *, preflight_only: bool = False,
           trials: int = 0, at_once: int | None = None) -> str:
    """The text of job.sh.

    folder, code: of the submission and of the snapshot. trials: number of tasks of an array; at_once: how many of them
    may run at a time.
    """
    check_plain(spec.directory)
    check_plain(Path.cwd())
    lines = ["#!/bin/bash", *(f"#SBATCH {flag}" for flag in flags(spec, site, trials, at_once)), ""]
    recipe = snapshot.place(code, spec.recipe)
    preflight = [str(recipe), *(spec.rest if spec.verb == "train" else [setting("data.path", spec.data)])]
    preflight += [f"--devices={site.gpus}", f"--disk={site.disk:g}"]
    preflight += [f"--{name.replace('_', '-')}={value:g}" for name in ("images_per_second", "bandwidth")
                  if (value := getattr(site, name)) is not None]
    if spec.plan:
        preflight += [setting("run.dir", spec.directory), *(["--independent"] if spec.verb == "search" else [])]
    values: dict[str, object] = {
        "title": f"{spec.verb} {spec.name}", "run": spec.directory, "launch": spec.directory.resolve() / LAUNCH,
        "folder": folder, "logs": str(folder).replace("%", "%%"), "code": code, "python": site.interpreter,
        "data": spec.data, "scratch": site.scratch or "", "interface": site.interface or "", "listen": site.listen,
        "ranks": site.ranks if spec.verb != "search" else 1, "gpus": site.gpus, "restarts": site.restarts,
        "warn": site.warn, "preflight": int(site.preflight or preflight_only), "preflight_only": int(preflight_only),
    }
    if spec.verb == "array":
        values["trials"] = spec.directory / "array"
    lines += [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    arguments = [] if spec.verb == "array" else spec.arguments(snapshot.place(code, spec.file), recipe)
    lines += [f"preflight_arguments=({shlex.join(preflight)})", f"arguments=({shlex.join(arguments)})"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += ["", (SCRIPTS / "signals.sh").read_text()]
    if site.setup:
        lines += ["trap 'echo \"a setup line of the site failed: $BASH_COMMAND\" >&2' ERR", "set -e",
                  *site.setup.values(), "set +e", "trap - ERR", ""]
    return "\n".join(lines) + "\n" + "".join((SCRIPTS / name).read_text() for name in PARTS[spec.verb])


def flags(spec: JobSpec, site: Site, trials: int = 0, at_once: int | None = None) -> list[str]:
    """The sbatch flags in the script's head. None of them holds a path."""
    head = [f"--job-name={spec.name}", f"--nodes={site.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={site.cpus}"]
    if site.gpus:
        head.append("--gres=gpu:" + (f"{site.gpu_type}:" if site.gpu_type else "") + str(site.gpus))
    for name, value in (("partition", site.partition), ("account", site.account), ("mem", site.memory)):
        if value is not None:
            head.append(f"--{name}={value}")
    if trials:
        head.append(f"--array=0-{trials - 1}" + (f"%{at_once}" if at_once else ""))
    head += [f"--time={max(1, round(site.hours * 60))}", f"--signal=B:USR1@{site.warn}", "--requeue",
             "--open-mode=append"]
    return head + [f"--{name}={value}" if value else f"--{name}" for name, value in site.sbatch.items()]


def sbatch(folder: Path, array: bool = False) -> list[str]:
    """The command that submits the job.sh of a submission's folder."""
    log = str(folder).replace("%", "%%") + ("/%A_%a.log" if array else "/%j.log")
    return ["sbatch", "--parsable", f"--chdir={os.getcwd()}", f"--output={log}", f"{folder}/job.sh"]


def submit(spec: JobSpec, site: Site, command: list[str], **options: Any) -> Job:
    """Write the script and the snapshot into the run's folder, submit the job and record it.

    command: submits it again. options: of `script`. Raises InputError where Slurm refuses the job; nothing is left in
    its queue then.
    """
    check(spec, site, options.get("trials", 0))
    folder = jobs.open_folder(spec.directory)
    code = snapshot.take(folder.parent)
    for file in {spec.file, spec.recipe}:
        snapshot.keep(code, file)
    (folder / "job.sh").write_text(script(spec, site, folder, code, **options))
    process = subprocess.run(sbatch(folder, bool(options.get("trials"))), capture_output=True, text=True)
    if process.returncode:
        shutil.rmtree(folder)
        raise InputError(f"sbatch refuses the job: {' '.join(process.stderr.split())}")
    return jobs.record("slurm", process.stdout.strip().split(";")[0], spec.directory, folder, command, site, code)


def check(spec: JobSpec, site: Site, trials: int = 0) -> None:
    """Raises InputError where the cluster cannot take the job, or something holds the folder of the run or search."""
    check_cluster(site)
    check_array(trials)
    jobs.check_free(spec.directory, "slurm", state)


def check_array(trials: int) -> None:
    """Raises InputError for more trials than an array of this Slurm may have."""
    process = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    limit = re.search(r"MaxArraySize\s*=\s*(\d+)", process.stdout)
    if limit and trials > int(limit.group(1)):
        raise InputError(f"{trials} trials: an array of this Slurm has at most {limit.group(1)} (MaxArraySize); launch "
                         "the search without --array, or fewer trials")


def check_cluster(site: Site) -> None:
    """Raises InputError where there is no Slurm, no such partition, or no such nodes in it."""
    if shutil.which("sbatch") is None:
        raise InputError("there is no sbatch on this machine: launch from a login node of the Slurm cluster, or print "
                         "the script without --submit and submit it there")
    process = subprocess.run(["sinfo", "--noheader", "--format=%R|%c|%G|%l|%D|%P"], capture_output=True, text=True)
    if process.returncode:
        raise InputError(f"sinfo: {' '.join(process.stderr.split())}")
    rows = [line.split("|") for line in process.stdout.splitlines()]
    names = sorted({row[0] for row in rows})
    partitions = site.partition or next((row[0] for row in rows if row[5].endswith("*")), None)
    if partitions is None:
        raise InputError(f"partition is not set, and this cluster has no default one. There are {', '.join(names)}")
    for name in partitions.split(","):
        own = [row for row in rows if row[0] == name]
        if not own:
            raise InputError(f"partition = {name}: this cluster has none of that name. There are {', '.join(names)}")
        limits = {"gpus": max(_gpus(row[2], site.gpu_type) for row in own),
                  "cpus": max(int(row[1].rstrip("+")) for row in own), "nodes": sum(int(row[4]) for row in own)}
        for resource, limit in limits.items():
            if getattr(site, resource) > limit:
                of_type = f" of type {site.gpu_type}" if resource == "gpus" and site.gpu_type else ""
                owner = "in it are" if resource == "nodes" else "a node there has"
                raise InputError(f"{resource} = {getattr(site, resource)} in partition {name}: {owner} at most "
                                 f"{limit}{of_type}")
        minutes = max(_minutes(row[3]) for row in own)
        if site.hours * 60 > minutes:
            raise InputError(f"hours = {site.hours:g} in partition {name}: its limit is {minutes / 60:g}")


def state(job: Job) -> str:
    """PENDING (why), RUNNING on NODES, ...; for an array the number of tasks in each state; `ended` where Slurm no
    longer has the job. Raises InputError where Slurm does not answer.
    """
    process = subprocess.run(["squeue", "--noheader", "--array", f"--jobs={job.id}", "--format=%T|%r|%N"],
                             capture_output=True, text=True)
    if process.returncode and "Invalid job id" not in process.stderr:
        raise InputError(f"squeue: {' '.join(process.stderr.split())}")
    rows = [line.split("|") for line in process.stdout.splitlines() if line]
    rows = [row for row in rows if row[0] in ACTIVE]
    if not rows:
        return ENDED
    if len(rows) > 1:
        states = [row[0] for row in rows]
        return ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states))
    name, reason, nodes = rows[0]
    return f"{name} on {nodes}" if nodes else f"{name} ({reason})"


def stop(job: Job) -> str:
    """Request that the job saves and does not come back. A waiting job leaves the queue. Returns what was done."""
    jobs.request_stop(job)
    before = state(job)
    if before == ENDED:
        return "it had ended"
    # Waiting tasks are cancelled at once; running ones get the signal that their script forwards.
    _run(["scancel", "--state=PENDING", job.id])
    if "RUNNING" in before:
        _run(["scancel", "--signal=USR1", "--batch", job.id])
        return "it saves and stops; launch status says when it has"
    return f"it was {before}: it does not start, or ends where it starts"


def print_logs(job: Job) -> int:
    """Print the logs of a submission."""
    printed: dict[Path, int] = {}
    _print_new(job, printed)
    if not printed:
        print("it has printed nothing yet")
    return 0


def follow(job: Job) -> int:
    """Print the logs of a submission, and what is added to them, until the job has ended."""
    printed: dict[Path, int] = {}
    while state(job) != ENDED:
        _print_new(job, printed)
        time.sleep(2)
    _print_new(job, printed)  # what was added before it ended
    return 0


def _print_new(job: Job, printed: dict[Path, int]) -> None:
    """Print what follows the positions in `printed` in the logs of a submission, and update the positions."""
    for path in sorted(job.path.glob("*.log"), key=lambda path: ("-" in path.stem, path.name)):
        with path.open(errors="replace") as file:
            file.seek(printed.get(path, 0))
            text = file.read()
            if text and len(printed) != 1 or path not in printed:
                print(f"==> {path.name}")
            print(text, end="", flush=True)
            printed[path] = file.tell()


def shown(spec: JobSpec, site: Site, **options: Any) -> str:
    """The script and the command that `submit` would use. Writes nothing."""
    folder = spec.directory.resolve() / LAUNCH / "TIME"
    text = script(spec, site, folder, folder.parent / "code-HASH", **options)
    return f"{text}\n# submitted by:\n# {shlex.join(sbatch(folder, bool(options.get('trials'))))}\n"


def _gpus(gres: str, gpu_type: str | None) -> int:
    """GPUs of a node, from sinfo's GRES column: gpu:h100:8(S:0-1),shard:4"""
    entries = re.findall(r"(?:^|,)gpu(?::([^:,(]+))?:(\d+)", gres)
    return max((int(count) for name, count in entries if gpu_type is None or name == gpu_type), default=0)


def _minutes(limit: str) -> float:
    """A time limit of sinfo's: infinite, 1-00:00:00, 12:00:00, 30:00."""
    if not limit[:1].isdigit():
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    seconds = sum(part * unit for part, unit in zip(reversed(parts), (1, 60, 3600), strict=False))
    return int(days or 0) * 24 * 60 + seconds / 60


def _run(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise InputError(f"{shlex.join(command)}: {' '.join(process.stderr.split())}")
