"""Looks at a job's nodes before the hours are spent, on all its ranks:

    torchrun --nproc-per-node 8 -m launch.preflight RECIPE [key=value ...] --devices 8 --disk 50 --report FILE
    python -m launch.preflight RECIPE          # one plain process

    devices     GPUs of each node against --devices (0: a CPU run), and one for every rank; CPU cores and threads
    versions    Python, packages, driver, the code itself and the data set's manifest: the same on every node
    collective  a sum over all ranks as gradients take it: right, and its bus bandwidth against --bandwidth
    data        images/s of the recipe's own loader, all ranks together, against --images-per-second; MB/s of its files
    disk        room where the run is written against --disk; a file written, synced, renamed and deleted there

Rank 0 prints a line for each, `ok` or `FAILED`, with what was asked, what was found and on which nodes. Exit codes: 0
all is well, 4 something is not, 2 for input that cannot be used; torchrun makes 1 of both, so --report says it too.

A check that hangs becomes a FAILED line after --timeout seconds, and a rank that does not answer is named.
"""

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.preflight import probe
from launch.preflight.rank_store import SLACK, Meeting, Silent, hangs, leave
from nulsq.config import Recipe, command_line
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.run.directory import path_of

EXIT_PREFLIGHT = 4
INODES = 1000  # a run has some dozens of files


@dataclass(frozen=True)
class Check:
    check: str
    ok: bool
    asked: str
    found: str
    measured: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':<8}{self.check:<12}{self.asked}: {self.found}"


def checks(meeting: Meeting, recipe: Recipe, asked: Any) -> Iterator[Check]:
    """The checks one after the other; every rank has to take them all. Raises Silent where a rank has stopped to
    answer."""
    limit, size = asked.timeout, meeting.size
    found = meeting.look("devices", probe.devices, recipe.run.device, seconds=limit)
    yield _devices(meeting, found, recipe, asked.devices)
    # One kind for all: where some ranks see no GPU, the sum is still taken between the CPUs.
    cuda = all(each.get("device", "cpu") != "cpu" for each in found)
    device = torch.device(found[meeting.rank]["device"] if cuda else "cpu")
    yield _versions(meeting, meeting.look("versions", probe.versions, recipe.data.path, seconds=limit))
    summed = [] if size == 1 else meeting.look("collective", probe.collective, meeting, device, limit,
                                               seconds=limit + SLACK)  # the library's own words come before ours
    yield _collective(meeting, summed, device, asked.bandwidth)
    share = (0, 1) if asked.independent else (meeting.rank, size)
    yield _data(meeting, meeting.look("data", probe.reading, recipe, *share, device, asked.read_seconds,
                                      seconds=limit + 2 * asked.read_seconds), asked)
    yield _disk(meeting, meeting.look("disk", probe.disk if meeting.first_of_node else lambda *_: {}, path_of(recipe),
                                      meeting.node, seconds=limit), path_of(recipe), asked.disk)


def _devices(meeting, found, recipe, asked):
    what = "any devices" if asked is None else f"{asked} GPUs on each node" if asked else "a CPU run"
    if wrong := meeting.errors(found):
        return Check("devices", False, what, wrong)
    ranks = Counter(meeting.nodes)
    text = meeting.where([each | {"ranks": ranks[node]} for node, each in zip(meeting.nodes, found, strict=True)],
                         lambda each: (f"{each['gpus']} x {each['name']}, " if each["gpus"] else "no GPU, ")
                         + f"{each['cores']} CPU cores, ranks: {each['ranks']}, threads of each: {each['threads']}")
    ok = all(each["gpus"] >= (asked or 0) for each in found)
    kinds = {each["device"] == "cpu" for each in found}
    if recipe.run.device == "cuda" and True in kinds or len(kinds) > 1 or asked and True in kinds:
        without = [meeting.named(rank) for rank, each in enumerate(found) if each["device"] == "cpu"]
        ok, text = False, f"{text}; no GPU for {', '.join(without)}"
    return Check("devices", ok, what, text, {"gpus": min(each["gpus"] for each in found)})


def _versions(meeting, found):
    if wrong := meeting.errors(found):
        return Check("versions", False, "the same on every node", wrong)
    odd = [f"{key}: {meeting.where([each[key] for each in found], str)}" for key in found[0]
           if len({each[key] for each in found}) > 1]
    same = ", ".join(f"{key} {value}" for key, value in found[0].items() if value != "not there")
    return Check("versions", not odd, "the same on every node", "; ".join(odd) or same)


def _collective(meeting, found, device, least):
    size = meeting.size
    what = f"a sum of {probe.SUMMED[device.type] >> 20} MB over {size} ranks" + (f" at {least:g} GB/s" if least else "")
    if size == 1:
        return Check("collective", True, what, "nobody to talk to")
    if wrong := meeting.errors(found):
        return Check("collective", False, what, wrong)
    # bus bandwidth: what each link carries if the ranks form a ring; the slowest rank's
    took = max(each["seconds"] for each in found)
    speed = 2 * (size - 1) / size * probe.SUMMED[device.type] / took / 1e9
    wrong = meeting.where(found, lambda each: None if each["right"] else "a wrong sum")
    way = "NCCL" if device.type == "cuda" else "gloo"
    text = meeting.where(found, lambda _: f"{speed:.3g} GB/s bus bandwidth ({way}, {took * 1e3:.3g} ms each)")
    return Check("collective", not wrong and speed >= (least or 0), what, wrong or text,
                 {"bus_gigabytes_per_second": speed})


def _data(meeting, found, asked):
    least = asked.images_per_second
    what = f"read for {asked.read_seconds:g} s" + (f" at {least:g} images/s" if least else "")
    if wrong := meeting.errors(found):
        return Check("data", False, what, wrong)
    images, raw = (sum(each[key] for each in found) for key in ("images", "bytes"))
    each_node = meeting.where(found, lambda each: f"{each['loader']} loader, {each['path']}")
    text = f"{images:.0f} images/s, {raw / 1e6:.0f} MB/s of the files, all ranks together; {each_node}"
    ok = images >= (least or 0)
    if not ok and meeting.size > 1:
        slowest = min(range(meeting.size), key=lambda rank: found[rank]["images"])
        text += f"; the slowest is {meeting.named(slowest)} with {found[slowest]['images']:.0f} images/s"
    return Check("data", ok, what, text, {"images_per_second": images, "bytes_per_second": raw})


def _disk(meeting, found, run, least):
    what = f"{least:g} GB and {INODES} inodes for {run}"
    if wrong := meeting.errors(found):
        return Check("disk", False, what, wrong)
    text = meeting.where(found, lambda each: each and (
        f"{each['free']:.3g} GB and {'any number of' if each['inodes'] is None else format(each['inodes'], '.2g')} "
        f"inodes free, written to {each['folder']}") or None)
    found = [each for each in found if each]
    ok = all(each["free"] >= least and (each["inodes"] is None or each["inodes"] >= INODES) for each in found)
    return Check("disk", ok, what, text, {"free_gigabytes": min(each["free"] for each in found)})


def parser() -> Parser:
    made = command_line.parser("python -m launch.preflight", __doc__)
    own = made.add_argument_group("what is asked")
    own.add_argument("--devices", type=int, metavar="N", help="GPUs of each node, 0: a CPU run (default: any number)")
    own.add_argument("--disk", type=float, default=2.0, metavar="GB", help="free where the run goes (%(default)s)")
    own.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the sum over all ranks (default: any)")
    own.add_argument("--images-per-second", type=float, metavar="N", help="all ranks together (default: any)")
    own.add_argument("--read-seconds", type=float, default=5.0, metavar="S", help="of reading, at most (%(default)s)")
    own.add_argument("--timeout", type=float, default=120.0, metavar="S", help="that a check may take (%(default)s)")
    own.add_argument("--independent", action="store_true", help="the ranks are runs of their own, as in a search: "
                     "each reads whole batches")
    own.add_argument("--report", type=Path, metavar="FILE", help="every check and whether all is well, as JSON")
    own.add_argument("--no-test", action="store_true", help="as nulsq.train takes it; nothing is evaluated here")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    asked, recipe = command_line.parse(parser(), argv)
    for name in ("devices", "disk", "bandwidth", "images_per_second"):
        if getattr(asked, name) is not None and not getattr(asked, name) >= 0:
            raise InputError(f"--{name.replace('_', '-')} = {getattr(asked, name):g}, allowed: at least 0")
    for name in ("read_seconds", "timeout"):
        if not 0 < getattr(asked, name) <= 86400:
            raise InputError(f"--{name.replace('_', '-')} = {getattr(asked, name):g}, allowed: above 0, at most 86400")
    first, found, meeting = os.environ.get("RANK", "0") == "0", [], Meeting()
    try:
        meeting.begin()
        if first:
            print(f"preflight of {asked.recipe}: {meeting.size} ranks on {', '.join(dict.fromkeys(meeting.nodes))}",
                  flush=True)
        for check in checks(meeting, recipe, asked):
            found.append(check)
            if first:
                print(check, flush=True)
    except Silent as silent:
        found.append(Check("ranks", False, "an answer from each", str(silent)))
        print(found[-1], flush=True)
    if dist.is_initialized() and not hangs():
        dist.destroy_process_group()
    failed = [check.check for check in found if not check.ok]
    if first:
        print(f"FAILED: {', '.join(failed)}" if failed else f"all {len(found)} checks ok", flush=True)
        if asked.report:
            _write(asked.report, {"ok": not failed, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "recipe": asked.recipe,
                                  "nodes": meeting.nodes, "checks": [dataclasses.asdict(check) for check in found]})
    meeting.end()
    return EXIT_PREFLIGHT if failed else 0


def _write(report, content):
    try:
        write_atomically(report, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--report {report} cannot be written: {error}") from None


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
