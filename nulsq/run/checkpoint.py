"""Checkpoints that can be trusted: RUN/checkpoints/step-STEP-epoch-EPOCH.pt and manifest.json with their checksums.

The newest two are kept, and those that they name as the best on the holdout. A file is written aside, synced, entered
in the manifest and then renamed: killed at any moment, or on a full disk, the ones before it are as they were. Loading
compares the checksum first; what is damaged is passed over for the next older one, with a warning. Files are read with
`weights_only`: nothing in a checkpoint is ever executed.
"""

import contextlib
import hashlib
import io
import json
import re
import warnings
from pathlib import Path

import torch

from nulsq.errors import InputError
from nulsq.files import UNFINISHED, sync_folder, temporary_path, write_atomically, write_synced

FORMAT = 2
FOLDER, MANIFEST = "checkpoints", "manifest.json"
NEWEST = 2  # so many are kept: should the last one be damaged, there is another
_NAME = re.compile(r"step-(\d+)-epoch-(\d+)\.pt")


def file_name(step: int, epoch: int) -> str:
    """`step` optimizer steps and `epoch` whole epochs, evaluated ones, were done."""
    return f"step-{step:08d}-epoch-{epoch:04d}.pt"


def save(run: Path, content: dict) -> Path:
    """Write a state's content. Returns the folder of the checkpoints.

    Raises InputError where the disk is full or cannot be written; what was saved before is untouched.
    """
    folder = run / FOLDER
    name = file_name(content["step"], content["epoch"])
    aside = temporary_path(folder / name)
    buffer = io.BytesIO()
    torch.save(content | {"format": FORMAT}, buffer)
    best = content["best"] and file_name(content["best"]["step"], content["best"]["epoch"])
    try:
        folder.mkdir(exist_ok=True)
        known = {each: entry for each, entry in _manifest(folder).items() if (folder / each).is_file()}
        known[name] = {"bytes": buffer.tell(), "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(), "best": best}
        write_synced(aside, buffer.getbuffer())
        write_atomically(folder / MANIFEST, json.dumps(known, indent=1))
        aside.replace(folder / name)
        sync_folder(folder)
    except OSError as error:
        for each in (aside, temporary_path(folder / MANIFEST)):
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)
        before = next(iter(files(run)), None)
        raise InputError(f"no checkpoint can be written to {folder}: {error.strerror or error}. "
                         + (f"The last good one is {before.name}; the same command continues from it"
                            if before else "There is none yet")) from None
    _prune(run, known)
    return folder


def load(path: Path) -> dict:
    """The content of a checkpoint file. Raises InputError where it is missing, damaged or not what was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"no checkpoint {path}: {error.strerror}") from None
    entry = _manifest(path.parent).get(path.name)
    if entry is not None and entry.get("sha256") != hashlib.sha256(data).hexdigest():
        raise InputError(f"{path} is damaged: its {len(data)} bytes are not the {entry.get('bytes')} that were written")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the reader raise whatever it comes upon
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version (format {FORMAT})")
    return content


def files(run: Path) -> list[Path]:
    """A run's checkpoint files, newest first; whole or damaged."""
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.name, reverse=True)


def newest(run: Path) -> Path | None:
    """The newest good checkpoint of a run; None where it has none yet. Damaged ones are named in a warning.

    Raises InputError where there are some and all are damaged: a run never starts anew by itself.
    """
    return _newest(run)[0]


def _newest(run):
    """Path and content of the newest good checkpoint; None and None where there is none yet."""
    found, problems = files(run), []
    for path in found:
        try:
            content = load(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}. Continuing from {path.name}", stacklevel=3)
        return path, content
    if found:
        raise InputError(f"none of the {len(found)} checkpoints of {run} can be read: {'; '.join(problems)}. "
                         f"Remove {run} to start anew")
    return None, None


def chosen(run: Path, which: str = "best") -> Path:
    """The checkpoint that a run stands for: with "last" its newest good one, else the best on the holdout that this
    one names, and itself where nothing was held out. Raises InputError where there is none."""
    return _chosen(run, which)[0]


def best_or_last(run: Path, which: str = "best") -> dict:
    """The content of the `chosen` one."""
    return _chosen(run, which)[1]


def _chosen(run, which):
    last, content = _newest(run)
    if last is None:
        raise InputError(f"{run} has no checkpoint")
    named = content["best"]
    if which == "last" or named is None:
        return last, content
    path = run / FOLDER / file_name(named["step"], named["epoch"])
    try:
        return path, content if path == last else load(path)
    except InputError as error:
        warnings.warn(f"{error}. Its best being lost, the run stands for {last.name}", stacklevel=3)
        return last, content


def _manifest(folder):
    """File name -> bytes, sha256, best. Empty where it is missing or damaged: files then speak for themselves."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        return {name: entry for name, entry in found.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _prune(run, known):
    kept = files(run)[:NEWEST]
    wanted = {path.name for path in kept} | {known.get(path.name, {}).get("best") for path in kept}
    for path in (run / FOLDER).iterdir():
        if path.name not in wanted and (_NAME.fullmatch(path.name) or path.name.endswith(UNFINISHED)):
            with contextlib.suppress(OSError):  # a file too many does no harm
                path.unlink()
