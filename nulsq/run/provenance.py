"""What a run was computed with: versions of the code and of packages, the machine, the environment (code.txt)."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from nulsq._version import __version__

SNAPSHOT = "SNAPSHOT"  # file next to a copy of the code: one line that says what it was copied from
# Variables that change what a run computes with, or say which job it belongs to; nothing that looks like a secret.
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_", "GLOO_", "NULSQ_", "TORCH", "PYTHONPATH",
               "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "RAY_ADDRESS", "RAY_JOB")
SECRETS = ("KEY", "TOKEN", "PASSWORD", "SECRET")
PACKAGES = ("torch", "torchvision", "timm", "pytorchcv", "numpy", "omegaconf", "ffcv", "numba", "ray")


def versions() -> dict[str, str]:
    """Version of each installed package that a run's numbers may depend on."""
    return {package: version for package in PACKAGES if (version := _version(package)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_code() -> str:
    """The text that every start of a run appends to its code.txt."""
    import torch  # only a run needs it, reading run directories does not

    devices = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    return (f"{time.strftime('%Y-%m-%d %H:%M:%S')}  nulsq {__version__}, {code_version()}\n"
            f"  python {platform.python_version()}, {packages}\n"
            f"  {platform.node()}, {devices}\n  {' '.join(sys.argv)}\n"
            f"  {' '.join(f'{name}={value!r}' for name, value in _environment().items())}\n")


def _environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items())
            if name.startswith(ENVIRONMENT) and not any(word in name.upper() for word in SECRETS)}


def code_version() -> str:
    """The commit of this code and whether it has local changes, or what its snapshot was copied from."""
    root = Path(__file__).resolve().parents[2]
    note = root / SNAPSHOT
    if note.is_file():  # git would report a checkout that the copy happens to lie in
        return note.read_text().partition("\n")[0]
    try:
        git = [subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=20).stdout.strip()
               for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]
    except (OSError, subprocess.TimeoutExpired):
        return "git is not there"
    return f"commit {git[0]}{' with local changes' if git[1] else ''}" if git[0] else "not a git checkout"
