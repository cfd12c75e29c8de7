"""Start or join the Ray cluster that runs a search's trials, and check that they fit.

    with open_cluster("local", workers=2):
        at_once = check_fits(cpus=1, gpus=0, workers=2)
        check_placement(cpus=1, gpus=0, workers=2)

`address` is local (start Ray on this machine), auto (join the cluster that runs on this machine, or RAY_ADDRESS) or
HOST:PORT of a cluster's head node.

**Token.** Ray's servers listen on every interface, and no setting changes that. So a local Ray requires a token, made
for this search (unless RAY_AUTH_MODE says otherwise). Ray reads mode and token when it is imported, so `open_cluster`
comes first. The user provides the token of a cluster: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token on
every node.

**Dashboard.** A trial of several workers holds a placement group that Tune does not know. When Tune stops the trial,
Ray's PlacementGroupCleaner frees the group, after it has asked the State API whether the trial's controller is alive.
Without the dashboard's server the group is never freed, and the next trial waits forever. So a local Ray has a
dashboard on loopback if trials have several workers, and `check_placement` tests any cluster before a trial starts.

**Fit.** Ray waits forever for resources that no node has. A worker is a bundle, and a bundle has to fit on one node.
The bundles of a trial may be on several nodes.
"""

import contextlib
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nulsq.errors import InputError
from nulsq.run.provenance import SECRETS

ROOT = Path(__file__).resolve().parents[2]
HEAD = "node:__internal_head__"  # a resource that only the head node has
# Prefixes of environment variables that trials inherit: caches of compiled kernels and of weights, communication of
# ranks, settings of loggers. Names that look like secrets are left out: a cluster's dashboard shows these values.
PASSED_ON = ("NULSQ_", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_", "HF_HOME", "TORCH_HOME",
             "XDG_CACHE_HOME", "WANDB_", "MLFLOW_", "NCCL_", "GLOO_", "RAY_TRAIN_", "TUNE_")
# If torchrun or srun started the search, Ray's processes inherit its variables. A trial is not a rank of that job; Ray
# Train sets the variables of its own workers.
NO_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}


@contextlib.contextmanager
def open_cluster(address: str = "local", workers: int = 1, nodes: int = 1, patience: float = 300) -> Iterator[None]:
    """Start Ray on this machine, or join a cluster and wait until it has `nodes` nodes. Disconnect at the end.

    Raises InputError where no cluster answers, and where nodes are missing after `patience` seconds.
    """
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        assert "ray" not in sys.modules, "Ray reads its token when it is imported: call open_cluster first"
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    variables = environment()
    # Ray's workers import code from the folder in which Ray was started. That has to be this code, and not a checkout
    # in the current directory that differs from it.
    with contextlib.chdir(ROOT):
        if address == "local":
            # "local" never joins another Ray on this machine. The ranks of a trial communicate over loopback.
            ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), object_store_memory=256 * 2**20,
                     include_dashboard=workers > 1, dashboard_host="127.0.0.1",
                     **_init_options({"GLOO_SOCKET_IFNAME": "lo"} | variables))
        else:
            _join(address, variables)
    try:
        wait_for_nodes(nodes, patience)
        yield
    finally:
        ray.shutdown()


def environment() -> dict[str, str]:
    """The environment variables of trials."""
    passed = {name: value for name, value in os.environ.items()
              if name.startswith(PASSED_ON) and not any(word in name for word in SECRETS)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return passed | NO_RANK | {"PYTHONPATH": path, "RAY_CHDIR_TO_TRIAL_DIR": "0"}


def wait_for_nodes(nodes: int, seconds: float) -> None:
    """Wait until `nodes` nodes of the cluster are alive, including a head node without cores.

    Raises InputError where they are fewer after `seconds`.
    """
    import ray

    deadline = time.monotonic() + seconds
    while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
        if time.monotonic() > deadline:
            raise InputError(f"nodes = {nodes}: the cluster has {alive} after {seconds:g} s; a larger patience waits "
                             f"longer, nodes = {alive} starts with these")
        time.sleep(0.2)


def check_fits(cpus: float, gpus: float, workers: int = 1) -> int:
    """How many trials fit on the cluster at once. Raises InputError where not even one does.

    `cpus` and `gpus` are those of each worker. Resources count even if they are in use now.
    """
    import ray

    nodes = sorted(((node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
                    for node in ray.nodes() if node["Alive"]), reverse=True)
    return fits(nodes, cpus, gpus, workers)


def fits(nodes: list[tuple[float, float]], cpus: float, gpus: float, workers: int) -> int:
    """As `check_fits`, for nodes given as (CPUs, GPUs)."""
    requested = f"cpus = {cpus:g}, gpus = {gpus:g}" + (f" for each of workers = {workers}" if workers > 1 else "")
    if gpus != int(gpus) and (gpus > 1 or workers > 1):
        raise InputError(f"{requested}: " + ("a fraction of a GPU is for trials of one process; allowed with several "
                                             "workers: 0 or 1" if workers > 1 else "allowed above 1: whole GPUs"))
    if workers > 1 and gpus > 1:
        raise InputError(f"{requested}: a worker drives one GPU; allowed with several workers: 0 or 1")
    counts = "; ".join(f"{nodes.count(node)} with {node[0]:g} CPU, {node[1]:g} GPU" for node in dict.fromkeys(nodes))
    present = f"nodes: {counts or 'none'}"
    bundles = sum(_bundles(node, cpus, gpus) for node in nodes)
    if not bundles:
        best = max(nodes, key=lambda node: (node[1] >= gpus, node[0]), default=(0, 0))
        process = "worker" if workers > 1 else "trial"
        raise InputError(f"{requested}: no node can hold one such {process} ({present}); at most "
                         f"cpus = {best[0]:g}, gpus = {min(best[1], max(gpus, 1)):g} would fit")
    if bundles < workers:
        raise InputError(f"{requested}: only {bundles} such workers fit at once ({present}); workers = {bundles} would "
                         "fit, or fewer cpus for each")
    return bundles // workers


def check_placement(cpus: float, gpus: float, workers: int, seconds: float = 60) -> None:
    """Place and free the bundles of a trial of several workers, and check that Ray's own cleaner could free them.

    Raises InputError, with a remedy, where it could not. Takes a few seconds.
    """
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    group = placement_group([bundle] * workers, strategy="PACK")  # as Ray Train does
    try:
        placed = group.wait(seconds)
        free = ray.available_resources()
    finally:
        remove_placement_group(group)
    if not placed:
        raise InputError(f"workers = {workers} of cpus = {cpus:g}, gpus = {gpus:g} found no place within "
                         f"{seconds:g} s; free in the cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU. "
                         "The rest is in use, or an earlier search has not freed it (see ray status)")
    _until(lambda: placement_group_table(group).get("state", "REMOVED") == "REMOVED", seconds,
           f"a placement group of {workers} workers is not freed within {seconds:g} s; see ray status")
    # On the head node, where Ray's cleaner runs: a dashboard often listens on the head's loopback only.
    probe = ray.remote(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)(_state_api_problem)
    try:
        problem = ray.get(probe.remote(), timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        problem = f"no answer from the head node within {seconds:g} s"
    if problem:
        raise InputError("trials of several workers need Ray's State API, else the resources of a stopped trial are "
                         "never freed; it does not answer on the head node. Run pip install \"ray[default]\" there and "
                         f"start Ray with ray start --head --include-dashboard=true ({problem})")


def _state_api_problem() -> str | None:
    """Send the request that Ray's PlacementGroupCleaner sends; return the error, or None if it is answered."""
    from ray.util.state import list_actors

    try:
        list_actors(limit=1, timeout=15)
    except Exception as error:  # any error would stop the cleaner, too
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return None


def _until(condition: Callable[[], bool], seconds: float, message: str) -> None:
    """Wait until the condition holds. Raises InputError with the message where it does not hold after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise InputError(message)
        time.sleep(0.1)


def _init_options(variables: dict[str, str]) -> dict[str, Any]:
    return {"runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": "ERROR"}


def _join(address: str, variables: dict[str, str]) -> None:
    import ray

    if address != "auto" and not (":" in address and address.rpartition(":")[2].isdigit() and "://" not in address):
        raise InputError(f"address = {address}, allowed: local, auto, or HOST:PORT of a cluster's head")
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:  # Ray itself would try for ten minutes
            raise InputError(f"address = {address}: nothing answers there ({error})") from None
    try:
        ray.init(address=address, **_init_options(variables))
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(f"address = {address}: {' '.join(str(error).split())[:200]}. No Ray runs there, or it refuses "
                         "this process: a cluster with a token needs RAY_AUTH_MODE=token and its token in "
                         "RAY_AUTH_TOKEN or ~/.ray/auth_token, one without needs RAY_AUTH_MODE=disabled") from None


def _bundles(node: tuple[float, float], cpus: float, gpus: float) -> int:
    """How many bundles fit on one node."""
    count = node[0] / cpus + 1e-9
    if gpus >= 1:
        count = min(count, node[1] / gpus)
    elif gpus:
        count = min(count, node[1] * math.floor(1 / gpus + 1e-9))  # Ray never gives a process parts of two GPUs
    return math.floor(count)
