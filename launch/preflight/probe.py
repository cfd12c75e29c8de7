"""Measures one rank's node: devices, versions, a sum over all ranks, reading speed, space on disk.

Results are dictionaries of numbers and text, which can be sent to other ranks. `launch/preflight/__main__.py` judges
them.
"""

import hashlib
import os
import platform
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import nulsq
from launch.preflight.rank_store import RankStore
from nulsq.config import Recipe
from nulsq.data import DataSet, build_loaders
from nulsq.files import write_synced
from nulsq.run import provenance
from nulsq.run.directory import LAUNCH

REPEATS = 5  # sums that are timed
SUMMED = {"cuda": 1 << 26, "cpu": 1 << 22}  # bytes of each
READ = 1 << 28  # bytes of the files that a rank reads at most


def devices(requested: str) -> dict[str, Any]:
    """GPUs, CPU cores and threads of this rank. `requested`: run.device of the recipe."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", 0))
    return {"gpus": count, "name": torch.cuda.get_device_name(0) if count else "", "local": local,
            "device": f"cuda:{local}" if requested != "cpu" and local < count else "cpu",
            "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}


def versions(data: str) -> dict[str, str]:
    """Versions of what is installed here, of the driver, of the code and of the data set's manifest."""
    installed = {"python": platform.python_version(), "nulsq": nulsq.__version__} | provenance.versions()
    installed |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    driver, manifest = Path("/sys/module/nvidia/version"), Path(data) / "manifest.json"
    if driver.is_file():
        installed["NVIDIA driver"] = driver.read_text().strip()
    code, digest = Path(nulsq.__file__).parent, hashlib.sha256()
    for file in sorted(path for pattern in ("*.py", "*.cpp", "*.h") for path in code.rglob(pattern)):
        digest.update(f"{file.relative_to(code)}\0".encode() + file.read_bytes())
    installed["code"] = digest.hexdigest()[:12]
    if manifest.is_file():
        installed["data set"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
    return installed


def collective(ranks: RankStore, device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds of a sum over all ranks, and whether it is right."""
    # Our own lines report what hangs or breaks; NCCL's watchdog would end the process instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("sum", ranks.store),
                            rank=ranks.rank, world_size=ranks.size, timeout=timedelta(seconds=seconds))
    values = torch.full((SUMMED[device.type] // 4,), ranks.rank + 1.0, device=device)
    dist.all_reduce(values)
    right = bool((values == ranks.size * (ranks.size + 1) / 2).all())
    values.zero_()
    start = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    values[0].item()  # wait for the GPU
    return {"right": right, "seconds": (time.perf_counter() - start) / REPEATS}


def reading(recipe: Recipe, rank: int, size: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Images per second of the recipe's own loader, and bytes per second of its files, each over at most `seconds`."""
    data = DataSet(recipe.data.path)
    images, loader = _images_per_second(recipe, data, rank, size, device, seconds)
    files = ([data.beton("train")] if loader == "ffcv" else [data.path / "train_images.npy"] if data.storage == "arrays"
             else data.paths("train")[rank::size])
    return {"images": images, "loader": loader, "path": str(data.path),
            "bytes": _bytes_per_second(files, rank / size, seconds)}


def _images_per_second(recipe: Recipe, data: DataSet, rank: int, size: int, device: torch.device,
                       seconds: float) -> tuple[float, str]:
    """Speed over an epoch, at most `seconds`, and the loader's name.

    The first batch starts workers and compiles, so it is left out if there are others. When this function returns, the
    loader's files are no longer mapped, and can be read from the disk again.
    """
    loaders = build_loaders(recipe.data, data, recipe.run.seed, rank, size, device, recipe.optim.epochs)
    train: Any = loaders.train
    images, elapsed = 0, 0.0
    start = time.perf_counter()
    batches = train.epoch(0)
    for number, (pixels, _, _) in enumerate(batches):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        images += len(pixels)
        if number == 0 and train.steps > 1:
            images, start = 0, time.perf_counter()
        elif elapsed > seconds:
            break
    batches.close()
    return images / max(elapsed, 1e-9), loaders.loader_name


def _bytes_per_second(files: Sequence[Any], share: float, seconds: float) -> float:
    """Reading speed of the files, from the disk. Of a single file, the part that starts at `share` of it is read."""
    count, start = 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            offset = int(share * path.stat().st_size) if len(files) == 1 else 0
            os.posix_fadvise(file.fileno(), offset, READ, os.POSIX_FADV_DONTNEED)  # drop it from the page cache
            file.seek(offset)
            while block := file.read(1 << 22):
                count += len(block)
                if count >= READ or time.perf_counter() - start > seconds:
                    return count / (time.perf_counter() - start)
    return count / max(time.perf_counter() - start, 1e-9)


def disk(run: Path, node: str) -> dict[str, Any]:
    """Space in the file system of a run's folder, after a file was written and deleted there. Makes no folder."""
    # A new run's folder may only hold launch/, so a file that a killed check leaves has to lie in there.
    folder = next(path for path in (run / LAUNCH, run, *run.absolute().parents) if path.is_dir())
    written = folder / f".preflight-{node}-{os.getpid()}"
    renamed = written.with_name(f"{written.name}-renamed")
    try:
        write_synced(written, written.name.encode() * 1000)
        written.replace(renamed)
        if renamed.read_bytes() != written.name.encode() * 1000:
            raise OSError(f"{folder}: a file does not read as it was written")
    finally:
        for path in (written, renamed):
            path.unlink(missing_ok=True)
    space = os.statvfs(folder)
    return {"folder": str(folder), "free": space.f_bavail * space.f_frsize / 1e9,
            "inodes": space.f_favail if space.f_files else None}  # some file systems have no table of them
