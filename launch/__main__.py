"""python -m launch PLACE train|search FILE ...: start the same recipe or search anywhere.

    python -m launch local train RECIPE --nproc 2        # here, in two processes; --print shows the command
    python -m launch slurm train RECIPE --site SITE      # prints the job's script; --submit submits it
    python -m launch slurm search SEARCH --site SITE     # on a Ray inside the job; --array: its trials without Ray
    python -m launch ray search SEARCH --site SITE       # through the jobs API of a Ray cluster
    python -m launch status|logs|stop DIR                # of a run or search that was submitted

A site file (configs/cluster/) says what the cluster is like; --at KEY=VALUE wins over it. Everything that can be wrong
is looked at before anything is submitted. Exit codes: 0, or that of a local run; 2 for input that cannot be used.
docs/launch.md tells the way from a laptop to Slurm and Ray.
"""

import subprocess
import sys
from pathlib import Path

from launch import jobs, local, status
from launch.site import Site, load_site
from launch.work import Refused, check_fits, look
from nulsq.config import describe
from nulsq.errors import InputError, Parser, exit_on_input_error

WHAT = {"train": "a recipe; settings and options behind it as for python -m nulsq.train",
        "search": "a search; settings behind it as for python -m tune.search"}


def parser() -> Parser:
    made = Parser(prog="python -m launch", description=__doc__)
    places = made.add_subparsers(dest="place", required=True, metavar="local|slurm|ray|status|logs|stop")
    here = places.add_parser("local", help="on this machine").add_subparsers(dest="verb", required=True)
    for verb, text in WHAT.items():
        each = _verb(here, verb, text)
        each.add_argument("--print", action="store_true", dest="show", help="print the command instead of running it")
        if verb == "train":
            each.add_argument("--nproc", type=int, default=1, help="processes (ranks) on this machine")
    for place, text in (("slurm", "as a batch job of a Slurm cluster"), ("ray", "as a job of a running Ray cluster")):
        verbs = places.add_parser(place, help=text).add_subparsers(dest="verb", required=True)
        for verb, what in WHAT.items():
            each = _verb(verbs, verb, f"{what}. Prints what would run, {text}; --submit submits it")
            each.add_argument("--site", required=True, metavar="FILE", help="the cluster: configs/cluster/")
            each.add_argument("--at", action="append", default=[], metavar="KEY=VALUE",
                              help="a setting of the site, wins over its file: --at nodes=4")
            each.add_argument("--submit", action="store_true", help="submit it, and say how to follow and stop it")
            if place == "slurm":
                each.add_argument("--sbatch", action="append", default=[], metavar="FLAG=VALUE",
                                  help="a further flag of sbatch: --sbatch qos=high")
                each.add_argument("--preflight-only", action="store_true",
                                  help="look at devices, network, data, disks and versions, train nothing")
                if verb == "search":
                    each.add_argument("--array", action="store_true",
                                      help="all trials as an array of jobs: no Ray, no early stopping")
                    each.add_argument("--at-once", type=int, metavar="N", help="trials of an array that run at a time")
            else:
                each.add_argument("--follow", action="store_true", help="after --submit: print what it prints")
            each.epilog = "\n".join(["settings of a site (key=default):", *describe(Site)])
    for verb, text in (("status", "how it is: its job, its outcome, how far it has come"),
                       ("logs", "what its processes printed"),
                       ("stop", "ask it to save and to end; the command that started it goes on")):
        each = places.add_parser(verb, help=text, description=text)
        each.add_argument("directory", help="of a run or search")
        if verb == "logs":
            each.add_argument("--follow", action="store_true", help="and what is added, until it has ended")
    return made


def _verb(places, verb, text):
    each = places.add_parser(verb, help=text.partition(";")[0], description=text)
    each.add_argument("file", help="YAML file")
    return each


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments, rest = parser().parse_known_args(argv)
    try:
        if arguments.place in ("status", "logs", "stop"):
            if rest:
                raise InputError(f"launch {arguments.place}: {rest[0]} is not known; it takes the folder of a run or "
                                 "search")
            directory = Path(arguments.directory)
            if arguments.place == "logs":
                return status.logs(directory, going_on=arguments.follow)
            return status.status(directory) if arguments.place == "status" else status.stop(directory)
        if arguments.place == "local":
            if arguments.verb == "train":
                return local.train(arguments.file, rest, arguments.nproc, show=arguments.show)
            return local.search(arguments.file, rest, show=arguments.show)
        flags = getattr(arguments, "sbatch", [])
        site = load_site(arguments.site, arguments.at, flags)
        if site.kind != arguments.place:
            raise InputError(f"{arguments.site} is a site of kind {site.kind}: python -m launch {site.kind} "
                             f"{arguments.verb} ... takes it")
        command = ["python", "-m", "launch", *argv]
        return (_slurm if arguments.place == "slurm" else _ray)(arguments, rest, site, command)
    except Refused as refused:
        return refused.args[0]


def _slurm(arguments, rest, site, command) -> int:
    from launch import slurm

    verb = "array" if getattr(arguments, "array", False) else arguments.verb
    at_once = getattr(arguments, "at_once", None)
    if at_once is not None and (verb != "array" or at_once < 1):
        raise InputError(f"--at-once {at_once}: of an --array, allowed: at least 1")
    work = look(verb, arguments.file, rest, site.nodes * site.ranks)
    if work.plan:
        check_fits(work.plan, site)
    if verb == "array" and work.plan["searcher"] == "tpe":
        raise InputError("searcher = tpe learns from results, and an array is drawn before there are any; allowed: "
                         "random, quasirandom")
    more = {"preflight_only": arguments.preflight_only}
    if verb == "array":
        more |= {"trials": work.trials, "at_once": at_once}
    if not arguments.submit:
        print(slurm.shown(work, site, **more), end="")
        return 0
    if verb == "array":
        slurm.check(work, site, work.trials)  # before the search's folder is written
        done = subprocess.run([sys.executable, "-m", "tune.array", arguments.file, *rest])
        if done.returncode:
            return done.returncode
    print(jobs.how(slurm.submit(work, site, command, **more)))
    return 0


def _ray(arguments, rest, site, command) -> int:
    from launch import ray_jobs

    work = look(arguments.verb, arguments.file, rest, site.ranks, files=site.code == "shared")
    if not arguments.submit:
        print(ray_jobs.shown(work, site))
        return 0
    job = ray_jobs.submit(work, site, command)
    print(jobs.how(job), flush=True)
    return status.logs(work.directory, going_on=True) if arguments.follow else 0


if __name__ == "__main__":
    raise SystemExit(main())
