"""On Slurm: the script that sbatch gets, and what happens to a submitted job.

A script is a head (#SBATCH, the job's own values, each quoted) and the text of launch/scripts/: signals.sh, the site's
setup lines, begin.sh, then train.sh or ray.sh. Paths are given to sbatch on its command line, which no shell reads.
Everything about a run that comes back after a time limit, a preemption or a dead node is in those scripts.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from launch import jobs, snapshot
from launch.jobs import ENDED, Job
from launch.site import Site
from launch.work import Work, check_plain, setting
from nulsq.errors import InputError
from nulsq.run.directory import LAUNCH

SCRIPTS = Path(__file__).resolve().parent / "scripts"
PARTS = {"train": ["begin.sh", "train.sh"], "array": ["array.sh", "begin.sh", "train.sh"],
         "search": ["begin.sh", "ray.sh"]}


def script(work: Work, site: Site, folder: Path, code: Path, *, preflight_only: bool = False,
           trials: int = 0, at_once: int | None = None) -> str:
    """The text of job.sh. `folder` is the submission's, `code` the snapshot's; an array has so many `trials`."""
    check_plain(work.directory)
    check_plain(Path.cwd())
    lines = ["#!/bin/bash", *(f"#SBATCH {flag}" for flag in flags(work, site, trials, at_once)), ""]
    recipe = snapshot.place(code, work.recipe)
    own = [word for word in work.rest if word != "--no-test"]
    look = [str(recipe), *(own if work.verb == "train" else [setting("data.path", work.data)])]
    look += [f"--devices={site.gpus}", f"--disk={site.disk:g}"]
    look += [f"--{name.replace('_', '-')}={value:g}" for name in ("images_per_second", "bandwidth")
             if (value := getattr(site, name)) is not None]
    if work.plan:
        look += [setting("run.dir", work.directory), *(["--independent"] if work.verb == "search" else [])]
    values = {
        "what": f"{work.verb} {work.name}", "run": work.directory, "launch": work.directory.resolve() / LAUNCH,
        "folder": folder, "logs": str(folder).replace("%", "%%"), "code": code, "python": site.interpreter,
        "data": work.data, "scratch": site.scratch or "", "interface": site.interface or "", "listen": site.listen,
        "ranks": site.ranks if work.verb != "search" else 1, "gpus": site.gpus, "restarts": site.restarts,
        "warn": site.warn, "preflight": int(site.preflight or preflight_only), "preflight_only": int(preflight_only),
    }
    if work.verb == "array":
        values["list"] = work.directory / "array"
    lines += [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    arguments = [] if work.verb == "array" else work.arguments(snapshot.place(code, work.file), recipe)
    lines += [f"look=({shlex.join(look)})", f"arguments=({shlex.join(arguments)})"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += ["", (SCRIPTS / "signals.sh").read_text()]
    if site.setup:
        lines += ["trap 'echo \"a setup line of the site failed: $BASH_COMMAND\" >&2' ERR", "set -e",
                  *site.setup.values(), "set +e", "trap - ERR", ""]
    return "\n".join(lines) + "\n" + "".join((SCRIPTS / name).read_text() for name in PARTS[work.verb])


def flags(work: Work, site: Site, trials: int = 0, at_once: int | None = None) -> list[str]:
    """The flags in the script's head. None of them holds a path."""
    found = [f"--job-name={work.name}", f"--nodes={site.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={site.cpus}"]
    if site.gpus:
        found.append("--gres=gpu:" + (f"{site.gpu_type}:" if site.gpu_type else "") + str(site.gpus))
    for name, value in (("partition", site.partition), ("account", site.account), ("mem", site.memory)):
        if value is not None:
            found.append(f"--{name}={value}")
    if trials:
        found.append(f"--array=0-{trials - 1}" + (f"%{at_once}" if at_once else ""))
    found += [f"--time={max(1, round(site.hours * 60))}", f"--signal=B:USR1@{site.warn}", "--requeue",
              "--open-mode=append"]
    return found + [f"--{name}={value}" if value else f"--{name}" for name, value in site.sbatch.items()]


def sbatch(folder: Path, array: bool = False) -> list[str]:
    """The command that submits what is in a submission's folder."""
    log = str(folder).replace("%", "%%") + ("/%A_%a.log" if array else "/%j.log")
    return ["sbatch", "--parsable", f"--chdir={os.getcwd()}", f"--output={log}", f"{folder}/job.sh"]


def submit(work: Work, site: Site, command: list[str], **more) -> Job:
    """Write the script and the snapshot into the run's folder, submit, and note the job. Raises InputError where Slurm
    refuses it; nothing is left in its queue then."""
    check(work, site, more.get("trials", 0))
    folder = jobs.open_folder(work.directory)
    code = snapshot.take(folder.parent)
    for file in {work.file, work.recipe}:
        snapshot.keep(code, file)
    (folder / "job.sh").write_text(script(work, site, folder, code, **more))
    done = subprocess.run(sbatch(folder, bool(more.get("trials"))), capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder)
        raise InputError(f"sbatch refuses the job: {' '.join(done.stderr.split())}")
    return jobs.note("slurm", done.stdout.strip().split(";")[0], work.directory, folder, command, site, code)


def check(work: Work, site: Site, trials: int = 0) -> None:
    """Raises InputError where the cluster cannot take the job, or something holds the folder of the run or search."""
    check_cluster(site)
    check_array(trials)
    jobs.check_free(work.directory, "slurm", state)


def check_array(trials: int) -> None:
    """Raises InputError for more trials than an array of this Slurm may have."""
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", done.stdout)
    if found and trials > int(found.group(1)):
        raise InputError(f"{trials} trials: an array of this Slurm has at most {found.group(1)} (MaxArraySize); launch "
                         "the search without --array, or fewer trials")


def check_cluster(site: Site) -> None:
    """Raises InputError where there is no Slurm, no such partition, or no such nodes in it."""
    if shutil.which("sbatch") is None:
        raise InputError("there is no sbatch on this machine: launch from a login node of the Slurm cluster, or print "
                         "the script without --submit and submit it there")
    done = subprocess.run(["sinfo", "--noheader", "--format=%R|%c|%G|%l|%D|%P"], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"sinfo: {' '.join(done.stderr.split())}")
    rows = [line.split("|") for line in done.stdout.splitlines()]
    names = sorted({row[0] for row in rows})
    wanted = site.partition or next((row[0] for row in rows if row[5].endswith("*")), None)
    if wanted is None:
        raise InputError(f"partition is not set, and this cluster has no default one. There are {', '.join(names)}")
    for name in wanted.split(","):
        own = [row for row in rows if row[0] == name]
        if not own:
            raise InputError(f"partition = {name}: this cluster has none of that name. There are {', '.join(names)}")
        most = {"gpus": max(_gpus(row[2], site.gpu_type) for row in own),
                "cpus": max(int(row[1].rstrip("+")) for row in own), "nodes": sum(int(row[4]) for row in own)}
        for what, there in most.items():
            if getattr(site, what) > there:
                each = f" of type {site.gpu_type}" if what == "gpus" and site.gpu_type else ""
                of = "in it are" if what == "nodes" else "a node there has"
                raise InputError(f"{what} = {getattr(site, what)} in partition {name}: {of} at most {there}{each}")
        limit = max((_minutes(row[3]) for row in own), default=None)
        if site.hours * 60 > limit:
            raise InputError(f"hours = {site.hours:g} in partition {name}: its limit is {limit / 60:g}")


def state(job: Job) -> str:
    """PENDING (why), RUNNING on NODES, ...; of an array how many are how; `ended` where Slurm no longer has it.

    Raises InputError where Slurm does not answer.
    """
    done = subprocess.run(["squeue", "--noheader", "--array", f"--jobs={job.id}", "--format=%T|%r|%N"],
                          capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise InputError(f"squeue: {' '.join(done.stderr.split())}")
    rows = [line.split("|") for line in done.stdout.splitlines() if line]
    rows = [row for row in rows if row[0] in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING",
                                              "REQUEUED", "PREEMPTED", "REQUEUE_HOLD", "STOPPED", "SIGNALING")]
    if not rows:
        return ENDED
    if len(rows) > 1:
        states = [row[0] for row in rows]
        return ", ".join(f"{states.count(each)} {each}" for each in dict.fromkeys(states))
    what, why, nodes = rows[0]
    return f"{what} on {nodes}" if nodes else f"{what} ({why})"


def stop(job: Job) -> str:
    """Ask the job to save and not to come back; one that waits is taken out of the queue. Returns what was done."""
    jobs.ask_to_stop(job)
    found = state(job)
    if found == ENDED:
        return "it had ended"
    # Those that wait at once, those that run by the signal that their script passes on.
    _told(["scancel", "--state=PENDING", job.id])
    if "RUNNING" in found:
        _told(["scancel", "--signal=USR1", "--batch", job.id])
        return "told to save and stop; launch status says when it has"
    return f"it was {found}: it does not start, or ends where it starts"


def follow(job: Job, going_on: bool) -> int:
    """Print the logs of a submission; `going_on`: and what is added to them, until the job has ended."""
    shown: dict[Path, int] = {}
    while True:
        ended = not going_on or state(job) == ENDED
        for path in sorted(job.path.glob("*.log"), key=lambda path: ("-" in path.stem, path.name)):
            with path.open(errors="replace") as file:
                file.seek(shown.get(path, 0))
                text = file.read()
                if text and len(shown) != 1 or path not in shown:
                    print(f"==> {path.name}")
                print(text, end="", flush=True)
                shown[path] = file.tell()
        if ended:
            if not shown:
                print("it has printed nothing yet")
            return 0
        time.sleep(2)


def shown(work: Work, site: Site, **more) -> str:
    """The script and the command, as `submit` would use them. Writes nothing that stays."""
    folder = work.directory.resolve() / LAUNCH / "TIME"
    text = script(work, site, folder, folder.parent / "code-HASH", **more)
    return f"{text}\n# submitted by:\n# {shlex.join(sbatch(folder, bool(more.get('trials'))))}\n"


def _gpus(gres: str, kind: str | None) -> int:
    """GPUs in what sinfo calls GRES: gpu:h100:8(S:0-1),shard:4"""
    found = re.findall(r"(?:^|,)gpu(?::([^:,(]+))?:(\d+)", gres)
    return max((int(count) for name, count in found if kind is None or name == kind), default=0)


def _minutes(limit: str) -> float:
    """A time limit of sinfo's: infinite, 1-00:00:00, 12:00:00, 30:00."""
    if not limit[:1].isdigit():
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    seconds = sum(part * each for part, each in zip(reversed(parts), (1, 60, 3600), strict=False))
    return int(days or 0) * 24 * 60 + seconds / 60


def _told(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}")
