"""Checkpoints: RUN/checkpoints/step-STEP-epoch-EPOCH.pt, and manifest.json with their checksums.

The newest two are kept, and the ones that they name as the best on the holdout. A file is written under a temporary
name, synced, entered in the manifest and then renamed: a kill at any moment, or a full disk, leaves the earlier ones
intact. Loading compares the checksum first; a damaged file is skipped for the next older one, with a warning. Files are
read with `weights_only`: nothing in a checkpoint is ever executed.
"""

import contextlib
import hashlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from nulsq.errors import InputError
from nulsq.files import UNFINISHED, sync_folder, temporary_path, write_atomically, write_synced

FORMAT = 2
FOLDER, MANIFEST = "checkpoints", "manifest.json"
KEEP_NEWEST = 2  # should the last one be damaged, there is another
_NAME = re.compile(r"step-(\d+)-epoch-(\d+)\.pt")


def file_name(step: int, epoch: int) -> str:
    """The name of a checkpoint after `step` optimizer steps and `epoch` whole, evaluated epochs."""
    return f"step-{step:08d}-epoch-{epoch:04d}.pt"


def save(run: Path, content: dict[str, Any]) -> Path:
    """Write the content of a state. Returns the folder of the checkpoints.

    Raises InputError where the disk is full or cannot be written; earlier checkpoints stay as they are.
    """
    folder = run / FOLDER
    name = file_name(content["step"], content["epoch"])
    temporary = temporary_path(folder / name)
    buffer = io.BytesIO()
    torch.save(content | {"format": FORMAT}, buffer)
    best = content["best"] and file_name(content["best"]["step"], content["best"]["epoch"])
    try:
        folder.mkdir(exist_ok=True)
        manifest = {known: entry for known, entry in _manifest(folder).items() if (folder / known).is_file()}
        manifest[name] = {"bytes": buffer.tell(), "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
                          "best": best}
        write_synced(temporary, buffer.getbuffer())
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
        temporary.replace(folder / name)
        sync_folder(folder)
    except OSError as error:
        for path in (temporary, temporary_path(folder / MANIFEST)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        last = next(iter(files(run)), None)
        raise InputError(f"no checkpoint can be written to {folder}: {error.strerror or error}. "
                         + (f"The last good one is {last.name}; the same command continues from it"
                            if last else "There is none yet")) from None
    _prune(run, manifest)
    return folder


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file. Raises InputError where it is missing, damaged or of another format."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"no checkpoint {path}: {error.strerror}") from None
    entry = _manifest(path.parent).get(path.name)
    if entry is not None and entry.get("sha256") != hashlib.sha256(data).hexdigest():
        raise InputError(f"{path} is damaged: its {len(data)} bytes are not the {entry.get('bytes')} that were written")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the reader raise any exception
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version (format {FORMAT})")
    return content


def files(run: Path) -> list[Path]:
    """A run's checkpoint files, newest first; damaged ones included."""
    folder = run / FOLDER
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=lambda path: path.name, reverse=True)


def newest(run: Path) -> Path | None:
    """The newest good checkpoint of a run; None where it has none yet. A warning names damaged ones.

    Raises InputError where there are checkpoints and all are damaged: a run never starts over by itself.
    """
    newest_good = _newest(run)
    return newest_good and newest_good[0]


def choose(run: Path, name: str = "best") -> Path:
    """The checkpoint that stands for a run. Raises InputError where there is none.

    `name` "last": the newest good one; "best" and "auto": the best on the holdout that the newest one names, and the
    newest one itself where nothing was held out.
    """
    return _choose(run, name)[0]


def load_chosen(run: Path, name: str = "best") -> dict[str, Any]:
    """The content of the checkpoint that `choose` returns."""
    return _choose(run, name)[1]


def _newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the newest good checkpoint."""
    paths, problems = files(run), []
    for path in paths:
        try:
            content = load(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}. Continuing from {path.name}", stacklevel=3)
        return path, content
    if paths:
        raise InputError(f"none of the {len(paths)} checkpoints of {run} can be read: {'; '.join(problems)}. "
                         f"Remove {run} to start over")
    return None


def _choose(run: Path, name: str) -> tuple[Path, dict[str, Any]]:
    newest_good = _newest(run)
    if newest_good is None:
        raise InputError(f"{run} has no checkpoint")
    last, content = newest_good
    best = content["best"]
    if name == "last" or best is None:
        return last, content
    path = run / FOLDER / file_name(best["step"], best["epoch"])
    try:
        return path, content if path == last else load(path)
    except InputError as error:
        warnings.warn(f"{error}. The best checkpoint is lost, {last.name} takes its place", stacklevel=3)
        return last, content


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> bytes, sha256, best. Empty where it is missing or damaged: files are then read without a check."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        return {name: entry for name, entry in content.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _prune(run: Path, manifest: dict[str, dict[str, Any]]) -> None:
    newest_paths = files(run)[:KEEP_NEWEST]
    keep = {path.name for path in newest_paths} | {manifest.get(path.name, {}).get("best") for path in newest_paths}
    for path in (run / FOLDER).iterdir():
        if path.name not in keep and (_NAME.fullmatch(path.name) or path.name.endswith(UNFINISHED)):
            with contextlib.suppress(OSError):  # a file that stays does no harm
                path.unlink()
