"""On a running Ray cluster, through its jobs API: what `ray job submit` gets, and what happens to a submitted job.

The job is a process on the cluster: for a search the driver, on the head node; for a run its ranks, on one node that
has the site's cpus and gpus free (a job that waits longer for such a node than 15 minutes fails, unless the head says
otherwise). It is one command without a shell around it: `exec env --chdir=DIR NAME=VALUE ... python -m ...`, each word
quoted. With `code: shared` it runs in the folder that it was submitted from, on the snapshot in the run's folder; with
`code: ship` the snapshot is uploaded, and nothing else.

**Stop.** Ray sends SIGTERM to the job's process and to all its descendants at once, waits for RAY_JOB_STOP_WAIT_TIME_S
(the site's `warn`; 3 seconds by default), then kills. It reads that in the job's own environment.
"""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from launch import jobs, local, snapshot
from launch import ray_api as api
from launch.jobs import ENDED, Job
from launch.site import Site
from launch.work import Work, check_plain
from nulsq.errors import InputError
from nulsq.run.directory import LAUNCH

ONLY_SLURM = ("partition", "account", "gpu_type", "memory", "sbatch", "scratch")


def command(work: Work, site: Site, name: str, code: Path) -> list[str]:
    """What submits the job `name`. `code` is the snapshot. Raises InputError for what a Ray job cannot be."""
    check_plain(work.directory)
    for each in ONLY_SLURM:
        if getattr(site, each):
            raise InputError(f"{each}: Slurm has that, a Ray job has not; leave it out of a site of kind ray")
    if work.verb == "train" and site.nodes > 1:
        raise InputError(f"nodes = {site.nodes}: a run is on one node of a Ray cluster; allowed: 1. Trials of a search "
                         "may have workers on several (workers=N)")
    if site.code == "ship":
        for key, path in (("run.dir" if work.verb == "train" else "dir", work.directory), ("data.path", work.data)):
            if not path.is_absolute():
                raise InputError(f"{key} = {path}: with code = ship the nodes do not see this folder; say the whole "
                                 "path of a folder that all of them see")
    interface = {f"{each}_SOCKET_IFNAME": site.interface for each in ("NCCL", "GLOO") if site.interface}
    variables = interface | site.environment | {"RAY_JOB_STOP_WAIT_TIME_S": str(site.warn)}
    words = [api.ray(), "job", "submit", *api.common(site), "--no-wait", f"--submission-id={name}",
             f"--runtime-env-json={json.dumps({'env_vars': variables})}"]
    if site.code == "ship":
        words.append(f"--working-dir={code}")
    if work.verb == "train":
        words += [f"--entrypoint-num-cpus={site.cpus}", f"--entrypoint-num-gpus={site.gpus}"]
    return [*words, "--", *entrypoint(work, site, code, variables)]


def entrypoint(work: Work, site: Site, code: Path, variables: dict[str, str]) -> list[str]:
    """The job's command; `variables` are set in its environment already. One process: it gets the signals itself."""
    ship = site.code == "ship"
    python = site.python or ("python" if ship else sys.executable)
    file, recipe = (_placed(site, code, each) for each in (work.file, work.recipe))
    # The snapshot before all else; the folder that it was submitted from at the end, for a plug-in that lies there.
    path = "." if ship else os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH"), os.getcwd()]))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "1"}
    if work.verb == "search":
        # What a search wants for its trials goes before what the job has: without this Ray refuses to have both.
        own["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
        run = [python, "-m", "tune.search", *work.arguments(file, recipe), "address=auto", f"nodes={site.nodes}"]
    elif site.ranks == 1:
        run = [python, "-m", "nulsq.train", *work.arguments(file, recipe)]
    else:
        own |= {"OMP_NUM_THREADS": str(max(1, site.cpus // site.ranks)), "GLOO_SOCKET_IFNAME": "lo"}
        torchrun = local.torchrun(site.ranks, "--shutdown-timeout", str(site.warn))
        run = [python, *torchrun[1:], "nulsq.train", *work.arguments(file, recipe)]
    own = [f"{name}={value}" for name, value in own.items() if name not in variables]
    words = ["env", *([] if ship else [f"--chdir={os.getcwd()}"]), *own, *run]
    if site.setup:
        words = ["sh", "-ec", "\n".join([*site.setup.values(), 'exec "$@"']), "setup", *words]
    return ["exec", *words]  # Ray has a shell read it


def shown(work: Work, site: Site) -> str:
    """The command that `submit` would run, and where its job runs. Writes nothing."""
    code = work.directory.resolve() / LAUNCH / "code-HASH"
    where = f"on a node with {site.cpus} CPU and {site.gpus} GPU free" if work.verb == "train" else "on the head node"
    return (f"{shlex.join(command(work, site, f'{work.name}-TIME', code))}\n"
            f"# through {site.address}, {api.token(site)[1]}; the job's process runs {where}")


def submit(work: Work, site: Site, given: list[str]) -> Job:
    """Write the snapshot into the run's folder, submit, and note the job and `given`, the command that submits it.

    Raises InputError where the cluster does not answer or refuses, or something holds the folder.
    """
    name = f"{work.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    command(work, site, name, Path("code"))
    api.check(site)
    jobs.check_free(work.directory, _held)
    folder = jobs.open_folder(work.directory)
    code = snapshot.take(folder.parent)
    for file in {work.file, work.recipe}:
        kept = snapshot.keep(code, file)
        if site.code == "ship" and not kept.is_relative_to(code):
            (code / kept.relative_to(code.parent)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(kept, code / kept.relative_to(code.parent))
    words = command(work, site, name, code)
    (folder / "job.sh").write_text(f"#!/bin/sh\n{shlex.join(words)}\n")
    # Noted first: what is lost in between, the cluster does not know, and is ended.
    job = jobs.note("ray", name, work.directory, folder, given, site, code)
    try:
        api.tell(words, site)
    except InputError:
        shutil.rmtree(folder)
        raise
    return job


def state(job: Job) -> str:
    """PENDING, RUNNING, `ended` (also where the cluster no longer knows it), or unknown (why)."""
    try:
        found = api.ask(Site(**job.site), f"/api/jobs/{job.id}").get("status")
    except InputError as error:
        return f"unknown ({error})"
    return {"PENDING": "PENDING (waits for its place)", "RUNNING": "RUNNING"}.get(found, ENDED)


def stop(job: Job) -> str:
    """Ask the job to save and to end. Returns what was done. Raises InputError where the cluster cannot be asked."""
    jobs.ask_to_stop(job)
    site = Site(**job.site)
    api.check(site)
    found = state(job)
    if found == ENDED:
        return "it had ended"
    api.tell([api.ray(), "job", "stop", *api.common(site), "--no-wait", "--", job.id], site)
    if found.startswith("PENDING"):
        return "it is ended as soon as it has its place; Ray cannot take it back before"
    return f"told to save and stop, within {site.warn} seconds; launch status says when it has"


def follow(job: Job, going_on: bool) -> int:
    """Print what the job has printed; `going_on`: and what is added, until it has ended. Returns its exit code then.

    A lost connection is taken up again; Ctrl-C ends the following, not the job. Raises InputError where there is none.
    """
    try:
        return _follow(job, Site(**job.site), going_on)
    except KeyboardInterrupt:
        print(f"\nno longer followed; job {job.id} goes on")
        return 130


def _follow(job, site, going_on):
    words = [api.ray(), "job", "logs", *api.common(site), *(["--follow"] if going_on else []), "--", job.id]
    seen = failures = 0
    while True:
        # Read through a pipe: it ends with us. In a session of its own: Ctrl-C is ours alone.
        with subprocess.Popen(words, env=api.environment(site), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, errors="replace", start_new_session=True) as process:
            try:
                for number, line in enumerate(process.stdout):
                    if number >= seen:  # a log that is taken up begins anew
                        seen, failures = number + 1, 0
                        if not line.startswith("Job submission server address"):
                            print(line, end="", flush=True)
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0 and not going_on:
            return 0
        try:
            found = api.ask(site, f"/api/jobs/{job.id}")
            if going_on and found.get("status") in ("SUCCEEDED", "STOPPED", "FAILED"):
                return found["driver_exit_code"] or int(found["status"] == "FAILED")
            lost = f"the Ray cluster at {site.address} " + ("loses the connection" if found else
                                                            f"does not know job {job.id}; was it started anew?")
        except InputError as error:
            lost = str(error)
        failures += 1
        if failures > api.TRIES or not going_on:
            raise InputError(lost)
        time.sleep(2)


def _placed(site, code, file):
    """Where the job finds a file: its whole path, or where it is in what is uploaded."""
    there = snapshot.place(code, file)
    return there if site.code == "shared" else there.relative_to(code if there.is_relative_to(code) else code.parent)


def _held(job):
    """As `state`; a job of a cluster that does not answer holds nothing, nor does one of Slurm's: the lock tells."""
    return ENDED if job.place != "ray" or (found := state(job)).startswith("unknown") else found
