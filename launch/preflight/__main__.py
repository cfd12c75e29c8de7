"""Checks a job's nodes before it trains for hours, on all its ranks:

    torchrun --nproc-per-node 8 -m launch.preflight RECIPE [key=value ...] --devices 8 --disk 50 --report FILE
    python -m launch.preflight RECIPE          # one plain process

    devices     GPUs of each node against --devices (0: a CPU run), and one for every rank; CPU cores and threads
    versions    Python, packages, driver, the code itself and the data set's manifest: the same on every node
    collective  a sum over all ranks, as of gradients: its result, and its bus bandwidth against --bandwidth
    data        images/s of the recipe's own loader, all ranks together, against --images-per-second; MB/s of its files
    disk        space where the run is written against --disk; a file written, synced, renamed and deleted there

Rank 0 prints a line for each check: `ok` or `FAILED`, what was required, what was measured and on which nodes. Exit
codes: 0 all checks passed, 4 some failed, 2 for input that cannot be used. torchrun turns 4 and 2 into 1, so --report
has the result too.

A check that hangs becomes a FAILED line after --timeout seconds, and a rank that does not answer is named.
"""

import argparse
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
from launch.preflight.rank_store import SLACK, RankStore, RankTimeout, exit_process, is_hanging
from nulsq.config import Recipe, command_line
from nulsq.errors import ExitCode, InputError, Parser, exit_on_input_error
from nulsq.files import write_atomically
from nulsq.run.directory import path_of

INODES = 1000  # a run has some dozens of files
MISSING = "not there"


@dataclass(frozen=True)
class Check:
    """The result of one check; the fields are those of the report's records."""

    check: str
    ok: bool
    asked: str  # what was required
    found: str  # what was measured, and on which nodes
    measured: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':<8}{self.check:<12}{self.asked}: {self.found}"


def checks(ranks: RankStore, recipe: Recipe, options: argparse.Namespace) -> Iterator[Check]:
    """The checks in their order; every rank has to consume all of them. Raises RankTimeout where a rank does not
    answer."""
    limit = options.timeout
    devices = ranks.gather("devices", probe.devices, recipe.run.device, seconds=limit)
    yield _devices(ranks, devices, recipe, options.devices)
    # All ranks use the same type of device: if one has no GPU, the sum is taken between CPUs.
    cuda = all(device.get("device", "cpu") != "cpu" for device in devices)
    device = torch.device(devices[ranks.rank]["device"] if cuda else "cpu")
    yield _versions(ranks, ranks.gather("versions", probe.versions, recipe.data.path, seconds=limit))
    sums = [] if ranks.size == 1 else ranks.gather("collective", probe.collective, ranks, device, limit,
                                                   seconds=limit + SLACK)  # the library's own error comes first
    yield _collective(ranks, sums, device, options.bandwidth)
    share = (0, 1) if options.independent else (ranks.rank, ranks.size)
    yield _data(ranks, ranks.gather("data", probe.reading, recipe, *share, device, options.read_seconds,
                                    seconds=limit + 2 * options.read_seconds), options)
    yield _disk(ranks, ranks.gather("disk", probe.disk if ranks.first_of_node else lambda *_: {}, path_of(recipe),
                                    ranks.node, seconds=limit), path_of(recipe), options.disk)


def _devices(ranks: RankStore, results: list[dict[str, Any]], recipe: Recipe, required: int | None) -> Check:
    requirement = ("any devices" if required is None else f"{required} GPUs on each node" if required else "a CPU run")
    if errors := ranks.errors(results):
        return Check("devices", False, requirement, errors)
    per_node = Counter(ranks.nodes)
    text = ranks.by_node([result | {"ranks": per_node[node]} for node, result in
                          zip(ranks.nodes, results, strict=True)],
                         lambda result: (f"{result['gpus']} x {result['name']}, " if result["gpus"] else "no GPU, ")
                         + f"{result['cores']} CPU cores, ranks: {result['ranks']}, threads of each: "
                         f"{result['threads']}")
    ok = all(result["gpus"] >= (required or 0) for result in results)
    without = [ranks.label(rank) for rank, result in enumerate(results) if result["device"] == "cpu"]
    if without and (recipe.run.device == "cuda" or required or len(without) < len(results)):
        ok, text = False, f"{text}; no GPU for {', '.join(without)}"
    return Check("devices", ok, requirement, text, {"gpus": min(result["gpus"] for result in results)})


def _versions(ranks: RankStore, results: list[dict[str, str]]) -> Check:
    requirement = "the same on every node"
    if errors := ranks.errors(results):
        return Check("versions", False, requirement, errors)
    installed = {name: [result.get(name, MISSING) for result in results] for result in results for name in result}
    different = [f"{name}: {ranks.by_node(versions, str)}" for name, versions in installed.items()
                 if len(set(versions)) > 1]
    same = ", ".join(f"{name} {versions[0]}" for name, versions in installed.items())
    return Check("versions", not different, requirement, "; ".join(different) or same)


def _collective(ranks: RankStore, results: list[dict[str, Any]], device: torch.device, least: float | None) -> Check:
    size = ranks.size
    requirement = f"a sum of {probe.SUMMED[device.type] >> 20} MB over {size} ranks" + (f" at {least:g} GB/s" if least
                                                                                        else "")
    if size == 1:
        return Check("collective", True, requirement, "a single rank")
    if errors := ranks.errors(results):
        return Check("collective", False, requirement, errors)
    # Bus bandwidth: what each link carries if the ranks form a ring. The slowest rank decides.
    seconds = max(result["seconds"] for result in results)
    speed = 2 * (size - 1) / size * probe.SUMMED[device.type] / seconds / 1e9
    wrong = ranks.by_node(results, lambda result: None if result["right"] else "a wrong sum")
    backend = "NCCL" if device.type == "cuda" else "gloo"
    text = ranks.by_node(results, lambda _: f"{speed:.3g} GB/s bus bandwidth ({backend}, {seconds * 1e3:.3g} ms each)")
    return Check("collective", not wrong and speed >= (least or 0), requirement, wrong or text,
                 {"bus_gigabytes_per_second": speed})


def _data(ranks: RankStore, results: list[dict[str, Any]], options: argparse.Namespace) -> Check:
    least = options.images_per_second
    requirement = f"read for {options.read_seconds:g} s" + (f" at {least:g} images/s" if least else "")
    if errors := ranks.errors(results):
        return Check("data", False, requirement, errors)
    images, raw = (sum(result[key] for result in results) for key in ("images", "bytes"))
    loaders = ranks.by_node(results, lambda result: f"{result['loader']} loader, {result['path']}")
    text = f"{images:.0f} images/s, {raw / 1e6:.0f} MB/s of the files, all ranks together; {loaders}"
    ok = images >= (least or 0)
    if not ok and ranks.size > 1:
        slowest = min(range(ranks.size), key=lambda rank: results[rank]["images"])
        text += f"; the slowest is {ranks.label(slowest)} with {results[slowest]['images']:.0f} images/s"
    return Check("data", ok, requirement, text, {"images_per_second": images, "bytes_per_second": raw})


def _disk(ranks: RankStore, results: list[dict[str, Any]], run: Path, least: float) -> Check:
    requirement = f"{least:g} GB and {INODES} inodes for {run}"
    if errors := ranks.errors(results):
        return Check("disk", False, requirement, errors)

    def describe(result: dict[str, Any]) -> str | None:
        if not result:  # not the first rank of its node
            return None
        inodes = "any number of" if result["inodes"] is None else f"{result['inodes']:.2g}"
        return f"{result['free']:.3g} GB and {inodes} inodes free, written to {result['folder']}"

    nodes = [result for result in results if result]
    ok = all(node["free"] >= least and (node["inodes"] is None or node["inodes"] >= INODES) for node in nodes)
    return Check("disk", ok, requirement, ranks.by_node(results, describe),
                 {"free_gigabytes": min(node["free"] for node in nodes)})


def parser() -> Parser:
    command = command_line.parser("python -m launch.preflight", __doc__)
    own = command.add_argument_group("requirements")
    own.add_argument("--devices", type=int, metavar="N", help="GPUs of each node, 0: a CPU run (default: any number)")
    own.add_argument("--disk", type=float, default=2.0, metavar="GB", help="free where the run goes (%(default)s)")
    own.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the sum over all ranks (default: any)")
    own.add_argument("--images-per-second", type=float, metavar="N", help="all ranks together (default: any)")
    own.add_argument("--read-seconds", type=float, default=5.0, metavar="S", help="of reading, at most (%(default)s)")
    own.add_argument("--timeout", type=float, default=120.0, metavar="S", help="limit of a check (%(default)s)")
    own.add_argument("--independent", action="store_true", help="the ranks are separate runs, as in a search: each "
                     "reads whole batches")
    own.add_argument("--report", type=Path, metavar="FILE", help="every check and the overall result, as JSON")
    return command


@exit_on_input_error
def main(argv: list[str]) -> int:
    options, recipe = command_line.parse(parser(), argv)
    for name in ("devices", "disk", "bandwidth", "images_per_second"):
        if getattr(options, name) is not None and not getattr(options, name) >= 0:
            raise InputError(f"--{name.replace('_', '-')} = {getattr(options, name):g}, allowed: at least 0")
    for name in ("read_seconds", "timeout"):
        if not 0 < getattr(options, name) <= 86400:
            raise InputError(f"--{name.replace('_', '-')} = {getattr(options, name):g}, allowed: above 0, at most "
                             "86400")
    first, results, ranks = os.environ.get("RANK", "0") == "0", [], RankStore()
    try:
        ranks.connect()
        if first:
            print(f"preflight of {options.recipe}: {ranks.size} ranks on {', '.join(dict.fromkeys(ranks.nodes))}",
                  flush=True)
        for check in checks(ranks, recipe, options):
            results.append(check)
            if first:
                print(check, flush=True)
    except RankTimeout as timeout:
        results.append(Check("ranks", False, "an answer from each", str(timeout)))
        print(results[-1], flush=True)
    if dist.is_initialized() and not is_hanging():
        dist.destroy_process_group()
    failed = [check.check for check in results if not check.ok]
    if first:
        print(f"FAILED: {', '.join(failed)}" if failed else f"all {len(results)} checks ok", flush=True)
        if options.report:
            _write(options.report, {"ok": not failed, "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
                                    "recipe": options.recipe, "nodes": ranks.nodes,
                                    "checks": [dataclasses.asdict(check) for check in results]})
    ranks.disconnect()
    return ExitCode.PREFLIGHT_FAILED if failed else ExitCode.FINISHED


def _write(report: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(report, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--report {report} cannot be written: {error}") from None


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
