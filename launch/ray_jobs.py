"""Jobs on a running Ray cluster, through its jobs API: what is submitted, and what happens to a submitted job.

The job is a process on the cluster. For a search it is the driver, on the head node. For a run it holds the ranks, on
one node that has the site's cpus and gpus free; a job that waits longer than 15 minutes for such a node fails, unless
the head is configured otherwise. The job is one command without a shell around it: `exec env --chdir=DIR NAME=VALUE ...
python -m ...`, each word quoted. With `code: shared` it runs in the folder that it was submitted from, on the snapshot
in the run's folder. With `code: ship` the snapshot is uploaded, and nothing else.

**Stop.** Ray sends SIGTERM to the job's process and to all its descendants at once, waits RAY_JOB_STOP_WAIT_TIME_S (the
site's `warn`; 3 seconds by default), then kills them. It reads that variable in the job's own environment.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from launch import jobs, local, snapshot
from launch.job_spec import JobSpec, check_plain
from launch.jobs import ENDED, UNKNOWN, Job
from launch.ray_client import connect, find_token
from launch.site import Site
from nulsq.errors import InputError
from nulsq.run.directory import LAUNCH

ONLY_SLURM = ("partition", "account", "gpu_type", "memory", "sbatch", "scratch")
RETRIES = 5  # of a lost connection, in a row


def submission(spec: JobSpec, site: Site, name: str, code: Path) -> dict[str, Any]:
    """The arguments of `JobSubmissionClient.submit_job` for the job `name`; `code` is the snapshot.

    Raises InputError for what a Ray job cannot have.
    """
    check_plain(spec.directory)
    for setting in ONLY_SLURM:
        if getattr(site, setting):
            raise InputError(f"{setting}: a setting of Slurm jobs, Ray jobs have none; leave it out of a site of kind "
                             "ray")
    if spec.verb == "train" and site.nodes > 1:
        raise InputError(f"nodes = {site.nodes}: a run is on one node of a Ray cluster; allowed: 1. Trials of a search "
                         "may have workers on several nodes (workers=N)")
    if site.code == "ship":
        for key, path in (("run.dir" if spec.verb == "train" else "dir", spec.directory), ("data.path", spec.data)):
            if not path.is_absolute():
                raise InputError(f"{key} = {path}: with code = ship the nodes do not see this folder; give the "
                                 "absolute path of a folder that all of them see")
    interface = {f"{library}_SOCKET_IFNAME": site.interface for library in ("NCCL", "GLOO") if site.interface}
    variables = interface | site.environment | {"RAY_JOB_STOP_WAIT_TIME_S": str(site.warn)}
    arguments: dict[str, Any] = {"submission_id": name, "runtime_env": {"env_vars": variables}}
    if site.code == "ship":
        arguments["runtime_env"]["working_dir"] = str(code)
    if spec.verb == "train":
        arguments |= {"entrypoint_num_cpus": site.cpus, "entrypoint_num_gpus": site.gpus}
    return arguments | {"entrypoint": shlex.join(entrypoint(spec, site, code, variables))}


def entrypoint(spec: JobSpec, site: Site, code: Path, variables: dict[str, str]) -> list[str]:
    """The job's command, which replaces the shell that Ray starts: the process gets signals itself.

    `variables` are set in its environment already.
    """
    ship = site.code == "ship"
    python = site.python or ("python" if ship else sys.executable)
    file, recipe = (_placed(site, code, path) for path in (spec.file, spec.recipe))
    # The snapshot comes first; the folder that the job was submitted from comes last, for a plug-in in it.
    path = "." if ship else os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH"), os.getcwd()]))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "1"}
    if spec.verb == "search":
        # Ray refuses a job whose driver sets a runtime environment too, as a search does for its trials, without this.
        own["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
        run = [python, "-m", "tune.search", *spec.arguments(file, recipe), "address=auto", f"nodes={site.nodes}"]
    elif site.ranks == 1:
        run = [python, "-m", "nulsq.train", *spec.arguments(file, recipe)]
    else:
        own |= {"OMP_NUM_THREADS": str(max(1, site.cpus // site.ranks)), "GLOO_SOCKET_IFNAME": "lo"}
        torchrun = local.torchrun(site.ranks, "--shutdown-timeout", str(site.warn))
        run = [python, *torchrun[1:], "nulsq.train", *spec.arguments(file, recipe)]
    assignments = [f"{name}={value}" for name, value in own.items() if name not in variables]
    words = ["env", *([] if ship else [f"--chdir={os.getcwd()}"]), *assignments, *run]
    if site.setup:
        words = ["sh", "-ec", "\n".join([*site.setup.values(), 'exec "$@"']), "setup", *words]
    return ["exec", *words]


def shown(spec: JobSpec, site: Site) -> str:
    """What `submit` would submit, and where it would run. Writes nothing, and does not connect."""
    arguments = submission(spec, site, f"{spec.name}-TIME", spec.directory.resolve() / LAUNCH / "code-HASH")
    where = f"on a node with {site.cpus} CPU and {site.gpus} GPU free" if spec.verb == "train" else "on the head node"
    return (f"{arguments.pop('entrypoint')}\n# submitted with {json.dumps(arguments)}\n"
            f"# through {site.address}, {'with' if find_token(site) else 'without'} a token; the job's process runs "
            f"{where}")


def submit(spec: JobSpec, site: Site, command: list[str]) -> Job:
    """Write the snapshot into the run's folder, submit the job and record it. `command` submits it again.

    Raises InputError where the cluster does not answer or refuses, or something holds the folder.
    """
    name = f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    submission(spec, site, name, Path("code"))  # before anything is written
    client = connect(site)
    jobs.check_free(spec.directory, "ray", state)
    folder = jobs.open_folder(spec.directory)
    code = snapshot.take(folder.parent)
    for file in {spec.file, spec.recipe}:
        kept = snapshot.keep(code, file)
        if site.code == "ship" and not kept.is_relative_to(code):
            (code / kept.relative_to(code.parent)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(kept, code / kept.relative_to(code.parent))
    arguments = submission(spec, site, name, code)
    (folder / "job.sh").write_text(f"#!/bin/sh\n{arguments['entrypoint']}\n")
    # Recorded first: a job that is recorded but never submitted is unknown to the cluster, which counts as ended.
    job = jobs.record("ray", name, spec.directory, folder, command, site, code)
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # upload the whole snapshot, whatever its .gitignore says
    try:
        client.submit_job(**arguments)
    except (RuntimeError, ValueError) as error:
        shutil.rmtree(folder)
        raise InputError(f"the job is not submitted: {' '.join(str(error).split())[:600]}") from None
    return job


def state(job: Job) -> str:
    """PENDING, RUNNING, `ended` (also where the cluster does not know the job), or unknown (why)."""
    try:
        status = connect(Site(**job.site)).get_job_info(job.id).status
    except InputError as error:
        return f"{UNKNOWN} ({error})"
    except RuntimeError:  # the cluster was restarted, or the job was never submitted
        return ENDED
    return {"PENDING": "PENDING (waits for its place)", "RUNNING": "RUNNING"}.get(status, ENDED)


def stop(job: Job) -> str:
    """Request that the job saves and ends. Returns what was done. Raises InputError if the cluster does not answer."""
    jobs.request_stop(job)
    client, before = connect(Site(**job.site)), state(job)
    if before == ENDED:
        return "it had ended"
    client.stop_job(job.id)
    if before.startswith("PENDING"):
        return "it ends as soon as it gets its place; Ray cannot withdraw it before"
    return f"it saves and stops within {job.site['warn']} seconds; launch status says when it has"


def print_logs(job: Job) -> int:
    """Print what the job has printed so far. Raises InputError where the cluster does not answer or know the job."""
    try:
        print(connect(Site(**job.site)).get_job_logs(job.id), end="")
    except RuntimeError as error:
        raise InputError(f"job {job.id}: {error}") from None
    return 0


def follow(job: Job) -> int:
    """Print the job's log, and what is added to it, until the job ends. Returns the job's exit code.

    A lost connection is restored. Raises InputError where the cluster is lost, or does not know the job.
    """
    site, printed, failures = Site(**job.site), 0, 0
    while True:
        try:
            client = connect(site)
            before, printed = printed, asyncio.run(_tail(client, job.id, printed))
            details = client.get_job_info(job.id)
            if details.status.is_terminal():
                reason = f": {(details.message or '').partition(', last available')[0]}"
                print(f"job {job.id} {details.status.lower()}{reason if details.status == 'FAILED' else ''}")
                return details.driver_exit_code or int(details.status == "FAILED")
            failures, lost = 0 if printed > before else failures, f"address = {site.address}: it closes the connection"
        except (InputError, RuntimeError) as error:
            lost = str(error)
        failures += 1
        if failures > RETRIES:
            raise InputError(f"job {job.id}: {lost}")
        time.sleep(2)


async def _tail(client: Any, job: str, printed: int) -> int:
    """Print a log after its first `printed` characters until the job or the connection ends. Returns the new count."""
    import aiohttp  # comes with Ray's client

    position = 0
    with contextlib.suppress(aiohttp.ClientError, RuntimeError):  # a lost connection
        async for text in client.tail_job_logs(job):
            print(text[max(0, printed - position):], end="", flush=True)
            position += len(text)
            printed = max(printed, position)
    return printed


def _placed(site: Site, code: Path, file: str) -> Path:
    """Where the job finds a file: its absolute path, or its path in what is uploaded."""
    path = snapshot.place(code, file)
    return path if site.code == "shared" else path.relative_to(code if path.is_relative_to(code) else code.parent)
