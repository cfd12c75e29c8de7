"""python -m launch PLACE train|search FILE ...: start the same recipe or search anywhere.

    python -m launch local train RECIPE --nproc 2        # here, in two processes; --print shows the command
    python -m launch slurm train RECIPE --site SITE      # prints the job's script; --submit submits it
    python -m launch slurm search SEARCH --site SITE     # on a Ray inside the job; --array: its trials without Ray
    python -m launch ray search SEARCH --site SITE       # through the jobs API of a Ray cluster
    python -m launch status|logs|stop DIR                # of a run or search that was submitted

A site file (configs/cluster/) says what the cluster is like; --at KEY=VALUE wins over it. All input is checked before
anything is submitted. Exit codes: 0, or that of a local run; 2 for input that cannot be used. docs/launch.md leads from
a laptop to Slurm and Ray.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from launch import jobs, local, status
from launch.job_spec import CheckFailed, check_fits, prepare
from launch.site import Site, load_site
from nulsq.config import describe
from nulsq.errors import InputError, Parser, exit_on_input_error

VERBS = {"train": "a recipe, followed by settings and options of python -m nulsq.train",
         "search": "a search, followed by settings of python -m tune.search"}


def parser() -> Parser:
    top = Parser(prog="python -m launch", description=__doc__)
    places = top.add_subparsers(dest="place", required=True, metavar="local|slurm|ray|status|logs|stop")
    verbs = places.add_parser("local", help="on this machine").add_subparsers(dest="verb", required=True)
    for verb, text in VERBS.items():
        command = _add_verb(verbs, verb, text)
        command.add_argument("--print", action="store_true", dest="show", help="print the command, do not run it")
        if verb == "train":
            command.add_argument("--nproc", type=int, default=1, help="processes (ranks) on this machine")
    for place, where in (("slurm", "as a batch job of a Slurm cluster"), ("ray", "as a job of a running Ray cluster")):
        verbs = places.add_parser(place, help=where).add_subparsers(dest="verb", required=True)
        for verb, text in VERBS.items():
            command = _add_verb(verbs, verb, f"{text}. Prints what would run, {where}; --submit submits it")
            command.add_argument("--site", required=True, metavar="FILE", help="the cluster: configs/cluster/")
            command.add_argument("--at", action="append", default=[], metavar="KEY=VALUE",
                                 help="a setting of the site, wins over its file: --at nodes=4")
            command.add_argument("--submit", action="store_true", help="submit it, and print how to follow and stop it")
            if place == "slurm":
                command.add_argument("--sbatch", action="append", default=[], metavar="FLAG=VALUE",
                                     help="a further flag of sbatch: --sbatch qos=high")
                command.add_argument("--preflight-only", action="store_true",
                                     help="check devices, network, data, disks and versions; train nothing")
                if verb == "search":
                    command.add_argument("--array", action="store_true",
                                         help="all trials as an array of jobs: no Ray, no early stopping")
                    command.add_argument("--at-once", type=int, metavar="N",
                                         help="trials of an array that run at a time")
            else:
                command.add_argument("--follow", action="store_true", help="after --submit: print the job's output")
            command.epilog = "\n".join(["settings of a site (key=default):", *describe(Site)])
    for verb, text in (("status", "the state of its jobs, its outcome and its progress"),
                       ("logs", "the output of its processes"),
                       ("stop", "request that it saves and ends; the command that started it continues it")):
        command = places.add_parser(verb, help=text, description=text)
        command.add_argument("directory", help="of a run or search")
        if verb == "logs":
            command.add_argument("--follow", action="store_true", help="print what is added, until it has ended")
    return top


def _add_verb(verbs: "argparse._SubParsersAction[Parser]", verb: str, text: str) -> Parser:
    command = verbs.add_parser(verb, help=text.partition(",")[0], description=text)
    command.add_argument("file", help="YAML file")
    return command


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments, rest = parser().parse_known_args(argv)
    try:
        if arguments.place in ("status", "logs", "stop"):
            if rest:
                raise InputError(f"launch {arguments.place}: {rest[0]} is not known; allowed: the folder of a run or "
                                 "search")
            directory = Path(arguments.directory)
            if arguments.place == "logs":
                return status.logs(directory, follow=arguments.follow)
            return status.status(directory) if arguments.place == "status" else status.stop(directory)
        if arguments.place == "local":
            if arguments.verb == "train":
                return local.train(arguments.file, rest, arguments.nproc, show=arguments.show)
            return local.search(arguments.file, rest, show=arguments.show)
        site = load_site(arguments.site, arguments.at, getattr(arguments, "sbatch", []))
        if site.kind != arguments.place:
            raise InputError(f"{arguments.site} is a site of kind {site.kind}: use it with python -m launch "
                             f"{site.kind} {arguments.verb} ...")
        launch = _slurm if arguments.place == "slurm" else _ray
        return launch(arguments, rest, site, ["python", "-m", "launch", *argv])
    except CheckFailed as failure:
        return failure.exit_code


def _slurm(arguments: argparse.Namespace, rest: list[str], site: Site, command: list[str]) -> int:
    from launch import slurm

    verb = "array" if getattr(arguments, "array", False) else arguments.verb
    at_once = getattr(arguments, "at_once", None)
    if at_once is not None and (verb != "array" or at_once < 1):
        raise InputError(f"--at-once {at_once}: of an --array, allowed: at least 1")
    spec = prepare(verb, arguments.file, rest, site.nodes * site.ranks)
    if spec.plan:
        check_fits(spec.plan, site)
    if verb == "array" and spec.plan["searcher"] == "tpe":
        raise InputError("searcher = tpe learns from results, and an array is drawn before there are any; allowed: "
                         "random, quasirandom")
    options = {"preflight_only": arguments.preflight_only}
    if verb == "array":
        options |= {"trials": spec.trials, "at_once": at_once}
    if not arguments.submit:
        print(slurm.shown(spec, site, **options), end="")
        return 0
    if verb == "array":
        slurm.check(spec, site, spec.trials)  # before the search's folder is written
        process = subprocess.run([sys.executable, "-m", "tune.array", arguments.file, *rest])
        if process.returncode:
            return process.returncode
    print(jobs.next_steps(slurm.submit(spec, site, command, **options)))
    return 0


def _ray(arguments: argparse.Namespace, rest: list[str], site: Site, command: list[str]) -> int:
    from launch import ray_jobs

    spec = prepare(arguments.verb, arguments.file, rest, site.ranks, check_files=site.code == "shared")
    if not arguments.submit:
        print(ray_jobs.shown(spec, site))
        return 0
    print(jobs.next_steps(ray_jobs.submit(spec, site, command)), flush=True)
    return status.logs(spec.directory, follow=True) if arguments.follow else 0


if __name__ == "__main__":
    raise SystemExit(main())
