"""Where a search's trials run: a Ray of its own on this machine, or a cluster that is there.

    with open_cluster("local", workers=2):
        at_once = check_fits(cpus=1, gpus=0, workers=2)
        check_placement(cpus=1, gpus=0, workers=2)

`address` is local, auto (the cluster that runs on this machine, or RAY_ADDRESS) or HOST:PORT of a cluster's head.

**Token.** Ray's servers listen on every interface whatever one sets, so the own Ray demands a token, made for this
search (unless RAY_AUTH_MODE says otherwise). Ray reads mode and token when it is imported: `open_cluster` comes first.
A cluster's token is the user's business: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token on every node.

**Dashboard.** A trial of several workers holds a placement group that Tune knows nothing of. When Tune stops the trial,
Ray's PlacementGroupCleaner frees it, and that asks the State API whether the trial's controller lives: without the
dashboard's server the places are never freed and the next trial waits for ever. So the own Ray has a dashboard on
loopback where trials have several workers, and `check_placement` asks any cluster before a trial is started.

**Fit.** Ray waits for ever for what no node has. A worker is a bundle, and a bundle has to fit on one node; the bundles
of a trial may be spread over nodes.
"""

import contextlib
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nulsq.errors import InputError
from nulsq.run.provenance import SECRETS

ROOT = Path(__file__).resolve().parent.parent
HEAD = "node:__internal_head__"  # the resource that Ray gives the head node, and no other
# Passed on to trials, where they are set here: caches of compiled kernels, of weights, how ranks talk, and what loggers
# want. Not what looks like a secret: a cluster's dashboard shows these to everyone who may look at it.
PASSED_ON = ("NULSQ_", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_", "HF_HOME", "TORCH_HOME",
             "XDG_CACHE_HOME", "WANDB_", "MLFLOW_", "NCCL_", "GLOO_", "RAY_TRAIN_", "TUNE_")
# The search itself may have been started by torchrun or srun, and Ray's processes inherit that: a trial is no rank of
# it. Ray Train sets these anew for its workers.
NO_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}


@contextlib.contextmanager
def open_cluster(address: str = "local", workers: int = 1, nodes: int = 1, patience: float = 300) -> Iterator[None]:
    """Start a Ray on this machine, or join a cluster once it has so many nodes; leave it at the end.

    Raises InputError where there is none, and where its nodes are not there after `patience` seconds.
    """
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        assert "ray" not in sys.modules, "Ray reads its token when it is imported: open_cluster comes before that"
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    common = {"runtime_env": {"env_vars": environment()}, "log_to_driver": False, "logging_level": "ERROR"}
    # Ray's workers look for code first in the folder that their search started Ray in: it is to be this very code, also
    # where that is a snapshot and the folder is a checkout that has changed since.
    with contextlib.chdir(ROOT):
        if address == "local":
            # "local": never join another user's Ray that happens to run here. The ranks of a trial meet on loopback.
            common["runtime_env"]["env_vars"] = {"GLOO_SOCKET_IFNAME": "lo"} | common["runtime_env"]["env_vars"]
            ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), object_store_memory=256 * 2**20,
                     include_dashboard=workers > 1, dashboard_host="127.0.0.1", **common)
        else:
            _join(address, common)
    try:
        wait_for_nodes(nodes, patience)
        yield
    finally:
        ray.shutdown()


def environment() -> dict[str, str]:
    """The variables of this process that its trials get."""
    passed = {name: value for name, value in os.environ.items()
              if name.startswith(PASSED_ON) and not any(word in name for word in SECRETS)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return passed | NO_RANK | {"PYTHONPATH": path, "RAY_CHDIR_TO_TRIAL_DIR": "0"}


def wait_for_nodes(nodes: int, seconds: float) -> None:
    """Wait until so many nodes of the cluster are alive, whatever they hold: a head may have no cores to give.

    Raises InputError where they are fewer after so many seconds.
    """
    import ray

    deadline = time.monotonic() + seconds
    while (there := sum(node["Alive"] for node in ray.nodes())) < nodes:
        if time.monotonic() > deadline:
            raise InputError(f"nodes = {nodes}: the cluster has {there} after {seconds:g} s; a larger patience waits "
                             f"longer, nodes = {there} does with what is there")
        time.sleep(0.2)


def check_fits(cpus: float, gpus: float, workers: int = 1) -> int:
    """How many trials fit at once. Raises InputError where not even one does.

    `cpus` and `gpus` are those of each worker. Counted is what the nodes have, whoever uses it now.
    """
    import ray

    nodes = sorted(((node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
                    for node in ray.nodes() if node["Alive"]), reverse=True)
    return fits(nodes, cpus, gpus, workers)


def fits(nodes: list[tuple[float, float]], cpus: float, gpus: float, workers: int) -> int:
    """As `check_fits`, for nodes of so many (CPUs, GPUs)."""
    asked = f"cpus = {cpus:g}, gpus = {gpus:g}" + (f" for each of workers = {workers}" if workers > 1 else "")
    if gpus != int(gpus) and (gpus > 1 or workers > 1):
        raise InputError(f"{asked}: " + ("a fraction of a GPU is for trials of one process; allowed with several "
                                         "workers: 0 or 1" if workers > 1 else "above 1 allowed are whole GPUs"))
    if workers > 1 and gpus > 1:
        raise InputError(f"{asked}: a worker drives one GPU; allowed with several workers: 0 or 1")
    have = "; ".join(f"{count} with {node[0]:g} CPU, {node[1]:g} GPU" for node, count in _counted(nodes))
    have = f"nodes: {have or 'none'}"
    bundles = sum(_bundles(node, cpus, gpus) for node in nodes)
    if not bundles:
        best = max(nodes, key=lambda node: (node[1] >= gpus, node[0]), default=(0, 0))
        what = "worker" if workers > 1 else "trial"
        raise InputError(f"{asked}: no node can hold one such {what} ({have}); at most "
                         f"cpus = {best[0]:g}, gpus = {min(best[1], max(gpus, 1)):g} would fit")
    if bundles < workers:
        raise InputError(f"{asked}: only {bundles} such workers fit at once ({have}); workers = {bundles} would fit, "
                         "or fewer cpus for each")
    return bundles // workers


def check_placement(cpus: float, gpus: float, workers: int, seconds: float = 60) -> None:
    """Place what a trial of several workers needs, free it again, and see whether Ray could free it by itself.

    Raises InputError, with what to do, where it cannot. Takes a few seconds.
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
                         "Others use it, or an earlier search left its places taken (see ray status)")
    _until(lambda: placement_group_table(group).get("state", "REMOVED") == "REMOVED", seconds,
           f"a placement group of {workers} workers is not freed within {seconds:g} s; see ray status")
    # From where Ray's cleaner asks: the dashboard of a cluster often listens on the head's loopback alone.
    asking = ray.remote(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)(_state_api_problem)
    try:
        problem = ray.get(asking.remote(), timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        problem = f"no answer from the head node within {seconds:g} s"
    if problem:
        raise InputError("trials of several workers need Ray's State API, else the places of a stopped trial are never "
                         "freed; it does not answer on the head node. Install pip install \"ray[default]\" there and "
                         f"start it with ray start --head --include-dashboard=true ({problem})")


def _state_api_problem():
    """What Ray's PlacementGroupCleaner asks, in a process on the head node; None where it is answered."""
    from ray.util.state import list_actors

    try:
        list_actors(limit=1, timeout=15)
    except Exception as error:  # whatever it is, the cleaner would meet it too
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return None


def _until(holds, seconds, otherwise):
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise InputError(otherwise)
        time.sleep(0.1)


def _join(address, common):
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
        ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(f"address = {address}: {' '.join(str(error).split())[:200]}. No Ray runs there, or it refuses "
                         "this process: a cluster with a token wants RAY_AUTH_MODE=token and its token in "
                         "RAY_AUTH_TOKEN or ~/.ray/auth_token, one without wants RAY_AUTH_MODE=disabled") from None


def _bundles(node, cpus, gpus):
    """How many bundles one node holds."""
    many = node[0] / cpus + 1e-9
    if gpus >= 1:
        many = min(many, node[1] / gpus)
    elif gpus:
        many = min(many, node[1] * math.floor(1 / gpus + 1e-9))  # Ray gives no process parts of two GPUs
    return math.floor(many)


def _counted(nodes):
    return [(node, nodes.count(node)) for node in dict.fromkeys(nodes)]
