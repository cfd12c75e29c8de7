"""What one rank finds on its node: devices, versions, a sum over all ranks, reading speed, room on disk.

Plain numbers and text, in dictionaries that another rank can be told of; launch/preflight/__main__.py judges them.
"""

import hashlib
import importlib.metadata
import os
import platform
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import nulsq
from launch.preflight.rank_store import Meeting
from nulsq.config import Recipe
from nulsq.data import DataSet, build_loaders
from nulsq.files import write_synced
from nulsq.run.directory import LAUNCH
from nulsq.run.provenance import PACKAGES

REPEATS = 5  # sums that are timed
SUMMED = {"cuda": 1 << 26, "cpu": 1 << 22}  # bytes of each
READ = 1 << 28  # bytes of the files that a rank reads at most


def devices(asked: str) -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", 0))
    return {"gpus": count, "name": torch.cuda.get_device_name(0) if count else "", "local": local,
            "device": f"cuda:{local}" if asked != "cpu" and local < count else "cpu",
            "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}


def versions(data: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "nulsq": nulsq.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not there"
    found |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    driver, manifest = Path("/sys/module/nvidia/version"), Path(data) / "manifest.json"
    found["NVIDIA driver"] = driver.read_text().strip() if driver.is_file() else "not there"
    code, digest = Path(nulsq.__file__).parent, hashlib.sha256()
    for file in sorted(path for kind in ("*.py", "*.cpp", "*.h") for path in code.rglob(kind)):
        digest.update(f"{file.relative_to(code)}\0".encode() + file.read_bytes())
    found["code"] = digest.hexdigest()[:12]
    found["data set"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12] if manifest.is_file() else "not there"
    return found


def collective(meeting: Meeting, device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds of a sum over all ranks, and whether it is right."""
    # What hangs or breaks is said by our own lines; NCCL's watchdog would end the process instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("sum", meeting.store),
                            rank=meeting.rank, world_size=meeting.size, timeout=timedelta(seconds=seconds))
    values = torch.full((SUMMED[device.type] // 4,), meeting.rank + 1.0, device=device)
    dist.all_reduce(values)
    right = bool((values == meeting.size * (meeting.size + 1) / 2).all())
    values.zero_()
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    values[0].item()  # the GPU has done it
    return {"right": right, "seconds": (time.perf_counter() - began) / REPEATS}


def reading(recipe: Recipe, rank: int, size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Images per second of the recipe's own loader, over an epoch or so many seconds, and MB/s of the files below.

    The first batch starts workers and compiles: it does not count where there are more.
    """
    data = DataSet(recipe.data.path)
    loaders = build_loaders(recipe.data, data, recipe.run.seed, rank, size, device)
    images, took = 0, 0.0
    began = time.perf_counter()
    batches = loaders.train.epoch(0)
    for number, (pixels, _, _) in enumerate(batches):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
        images += len(pixels)
        if number == 0 and loaders.train.steps > 1:
            images, began = 0, time.perf_counter()
        elif took > seconds:
            break
    batches.close()
    kind = loaders.loader_name
    loaders = batches = pixels = None  # what is mapped stays in memory: the disk would not be asked
    files = ([data.beton("train")] if kind == "ffcv" else [data.path / "train_images.npy"] if data.storage == "arrays"
             else data.paths("train")[rank::size])
    return {"images": images / max(took, 1e-9), "loader": kind, "path": str(data.path),
            "bytes": _raw(files, rank / size, seconds)}


def _raw(files, share, seconds):
    count, began = 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            start = int(share * path.stat().st_size) if len(files) == 1 else 0
            os.posix_fadvise(file.fileno(), start, READ, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            file.seek(start)
            while block := file.read(1 << 22):
                count += len(block)
                if count >= READ or time.perf_counter() - began > seconds:
                    return count / (time.perf_counter() - began)
    return count / max(time.perf_counter() - began, 1e-9)


def disk(run: Path, node: str) -> dict[str, Any]:
    """Room in the file system of a run's folder, after a file was written and deleted there. Makes no folder."""
    # A new run's folder has to be empty but for launch/: what a killed test leaves should lie there.
    folder = next(path for path in (run / LAUNCH, run, *run.absolute().parents) if path.is_dir())
    written = folder / f".preflight-{node}-{os.getpid()}"
    renamed = written.with_name(f"{written.name}-renamed")
    try:
        write_synced(written, written.name.encode() * 1000)
        written.replace(renamed)
        if renamed.read_bytes() != written.name.encode() * 1000:
            raise OSError(f"{folder}: what was read is not what was written")
    finally:
        for path in (written, renamed):
            path.unlink(missing_ok=True)
    room = os.statvfs(folder)
    return {"folder": str(folder), "free": room.f_bavail * room.f_frsize / 1e9,
            "inodes": room.f_favail if room.f_files else None}  # some file systems have no table of them
