"""A site file: what a cluster is like and what a job may use of it. configs/cluster/*.yaml are examples.

    kind: slurm
    partition: gpu
    nodes: 2
    gpus: 8                                # of each node
    hours: 24
    setup: {modules: module load cuda/12}  # the only lines that a shell executes as they are
    sbatch: {qos: high}                    # further flags of sbatch

`launch slurm|ray ... --site FILE --at nodes=4 --at hours=2 --sbatch qos=low` reads it; settings of the command line win
over the file. A site file may build on another: the line `base: OTHER.yaml` takes its settings. Values that go into a
script are checked here and quoted there: only `setup` is shell.
"""

import dataclasses
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nulsq.config import load, setting
from nulsq.errors import InputError, did_you_mean

NAME = r"[\w.,:@+-]+"
FLAG_VALUE = r"[\w.,:;=@%+/\[\]()*&|!~?-]+"
# Flags that are passed to sbatch, and those that a setting replaces or that the scripts depend on.
FLAGS = ("qos", "constraint", "exclude", "nodelist", "dependency", "reservation", "comment", "mail-type", "mail-user",
         "licenses", "exclusive", "mem-per-gpu", "mem-per-cpu", "tmp", "switches", "nice", "begin", "deadline",
         "cpu-freq", "cores-per-socket", "hint", "wckey", "contiguous", "prefer", "priority", "get-user-env",
         "gpu-bind", "gpu-freq", "threads-per-core", "container", "network", "power", "thread-spec")
OWN_FLAGS = {"partition": "partition", "account": "account", "nodes": "nodes", "time": "hours", "mem": "memory",
             "gpus-per-node": "gpus", "gpus": "gpus", "gres": "gpus", "cpus-per-task": "cpus", "signal": "warn",
             "requeue": "restarts", "no-requeue": "restarts", "export": "environment", "ntasks-per-node": "processes",
             "ntasks": "processes"}


@dataclass(frozen=True)
class Site:
    """A cluster, and a job's share of it."""

    kind: Literal["slurm", "ray"] = setting("slurm", "slurm: sbatch; ray: the jobs API of a running Ray cluster")
    partition: str | None = setting(None, "Slurm partition; default: the cluster's")
    account: str | None = setting(None, "Slurm account that the hours are charged to")
    nodes: int = setting(1, "nodes of a job; on a Ray cluster: nodes that a search waits for, with the head", low=1)
    gpus: int = setting(0, "GPUs of each node; 0: CPU only", low=0)
    gpu_type: str | None = setting(None, "TYPE in Slurm's gpu:TYPE:N")
    cpus: int = setting(1, "CPU cores of each node", low=1)
    processes: int | None = setting(None, "ranks on each node; default: one for each GPU, one without", low=1)
    memory: str | None = setting(None, "of each node, in Slurm's form: 64G; 0: all of it")
    hours: float = setting(24.0, "time limit", above=0)
    warn: int = setting(300, "seconds before the limit at which a run saves and goes back into the queue", low=10)
    restarts: int = setting(20, "how often a job may go back into the queue", low=0)
    sbatch: dict[str, str] = setting(dict, "further flags of sbatch: qos, constraint, exclude, dependency, ...")
    setup: dict[str, str] = setting(dict, "NAME: a line of shell that runs first, on the job's first node")
    environment: dict[str, str] = setting(dict, "variables of the job's processes; no secrets, Ray shows them")
    python: str | None = setting(None, "the interpreter's path on the nodes; default: the one that launches")
    scratch: str | None = setting(None, "folder on each node's own disk to which the data are copied before training")
    interface: str | None = setting(None, "network interface for gradients, such as ib0; default: NCCL and gloo choose")
    preflight: bool = setting(True, "check devices, network, data, disks and versions before training")
    images_per_second: float | None = setting(None, "preflight passes if all ranks together read as many", above=0)
    bandwidth: float | None = setting(None, "GB/s of an all-reduce with which preflight passes", above=0)
    disk: float = setting(2.0, "GB that must be free where runs are written", low=0)
    address: str = setting("http://127.0.0.1:8265", "of a Ray cluster's jobs API, which is its dashboard's")
    code: Literal["shared", "ship"] = setting("shared", "shared: the Ray cluster's nodes see this folder; ship: the "
                                              "code is uploaded, data and results have absolute paths there")
    token: str | None = setting(None, "file with the Ray cluster's token; default: RAY_AUTH_TOKEN_PATH, or "
                                "~/.ray/auth_token")
    listen: str = setting("127.0.0.1", "address on which the dashboard of a job's own Ray listens")

    @property
    def ranks(self) -> int:
        """Processes on each node."""
        return self.processes or max(1, self.gpus)

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable


def load_site(path: str | Path, overrides: Iterable[str] = (), flags: Iterable[str] = ()) -> Site:
    """Read and check a site file. Raises InputError for values that Slurm rejects or a shell would misread."""
    site = load(Site, path, overrides)
    extra_flags = {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if not name or (not equals and name not in ("exclusive", "contiguous")):
            raise InputError(f"--sbatch {flag}: allowed: NAME=VALUE, for example --sbatch qos=high")
        extra_flags[name] = value
    site = dataclasses.replace(site, sbatch=site.sbatch | extra_flags)
    for name in ("partition", "account", "gpu_type", "memory", "interface", "listen"):
        _check(name, getattr(site, name), NAME)
    for name, value in site.sbatch.items():
        _check_flag(name, value)
    for name, value in site.environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"environment.{name!r}: not the name of a variable")
        _check(f"environment.{name}", value, r"[^\n\0]*")
    for name, line in site.setup.items():
        _check(f"setup.{name}", line, r"[^\n\0]*")
    for name in ("python", "scratch", "token"):
        _check(name, getattr(site, name), r"[^\n\0]+")
    if site.scratch and not Path(site.scratch).is_absolute():
        raise InputError(f"scratch = {site.scratch}: allowed: the absolute path of a folder on every node's own disk")
    if site.gpus and site.processes and site.processes > site.gpus:
        raise InputError(f"processes = {site.processes} on gpus = {site.gpus}: each rank needs a GPU of its own")
    if site.warn >= site.hours * 3600:
        raise InputError(f"warn = {site.warn} seconds before a limit of hours = {site.hours:g}, allowed: less than "
                         f"{site.hours * 3600:g}")
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/\S*)?", site.address):
        raise InputError(f"address = {site.address!r}: allowed: the jobs API of a Ray cluster, for example http://head:8265")
    return site


def _check(name: str, value: str | None, allowed: str) -> None:
    if value is not None and not re.fullmatch(allowed, value):
        raise InputError(f"{name} = {value!r} cannot be used: " + (
            "it has line breaks" if "\\n" in allowed else "allowed: letters, digits and . , : @ + -"))


def _check_flag(name: str, value: str) -> None:
    if name in OWN_FLAGS:
        raise InputError(f"sbatch.{name}: set {OWN_FLAGS[name]}=... instead")
    if name not in FLAGS:
        hint = did_you_mean(name, FLAGS, cutoff=0.6)
        raise InputError(f"sbatch.{name}: not a flag that is passed to sbatch.{hint} Allowed: {', '.join(FLAGS)}")
    if value and not re.fullmatch(FLAG_VALUE, value):
        raise InputError(f"sbatch.{name} = {value!r} cannot be used: no spaces, quotes, $ and the like")
