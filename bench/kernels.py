"""The CPU kernel compared with that of another commit, for each direction.

    python -m bench.kernels COMMIT [--methods nulsq lcq --bits 2 4 --json FILE]

Both are compiled here with the flags of nulsq/quant/op/cpu/build.py and called in turn on the same tensors, a batch
norm's output of 128 x 16 x 32 x 32, channels last, whose ReLU is left to the quantizer. Ratios are this kernel's time
over that one's.
"""

import ctypes
import itertools
import re
import subprocess
from pathlib import Path
from unittest import mock

import torch

from bench.quantizers import METHODS, SHAPE, quantizer
from bench.timing import add_options, begin, interleaved, scratch, show, table, timed_row, write_json
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.quant.op.cpu import build
from nulsq.quant.op.cpu import kernel as cpu

TENSORS = 8  # in turn: none is in the caches from the round before
ROOT = Path(__file__).resolve().parent.parent


def library_of(commit: str, folder: Path) -> ctypes.CDLL:
    """That commit's kernel. Raises InputError where git has no such commit with one, or it is called otherwise."""
    for source in build.SOURCES:
        name = f"{commit}:{source.relative_to(ROOT).as_posix()}"
        shown = subprocess.run(["git", "show", name], cwd=ROOT, capture_output=True, text=True)
        if shown.returncode:
            raise InputError(f"COMMIT {commit}: {shown.stderr.strip().splitlines()[0]}")
        (folder / source.name).write_text(shown.stdout)
    theirs, ours = ("".join(source.read_text() for source in sources)
                    for sources in ([folder / source.name for source in build.SOURCES], build.SOURCES))
    for name in ("Call", "Rule"):
        found = [re.search(rf"^struct {name} {{.*?^}};", text, re.S | re.M) for text in (theirs, ours)]
        if found[0] is None or found[0].group() != found[1].group():
            raise InputError(f"COMMIT {commit}: its kernel is called with another {name} than this one's")
    with mock.patch.multiple(build, SOURCES=[folder / source.name for source in build.SOURCES]), \
            mock.patch.dict("os.environ", {"NULSQ_CACHE": str(folder)}):
        return cpu.load_library(build.compiled_library())


def measure(library: ctypes.CDLL, methods: list[str], bits: list[int], rounds: int) -> list[dict]:
    libraries = {"that": library, "this": cpu._library()}
    draw = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(SHAPE, generator=draw).contiguous(memory_format=torch.channels_last) for _ in range(2)]
             for _ in range(TENSORS)]
    rows = []
    for method, width in itertools.product(methods, bits):
        if (made := quantizer(method, width, pairs[0][0].relu())) is None:
            continue
        with torch.no_grad():
            arguments = made.table(made._elements(pairs[0][0])), made.rule()._replace(relu=True)
        for what, run in (("forward", lambda x, dy, a=arguments: cpu.quantize(x, *a)),
                          ("backward", lambda x, dy, a=arguments: cpu.gradients(x, dy, *a))):
            turns = itertools.cycle(pairs)  # of both sides: the second would find the first one's tensors in the caches
            sides = {name: _called(each, run, turns) for name, each in libraries.items()}
            times = interleaved(sides, rounds, warm_up=3)
            rows.append(timed_row(METHODS[method], width, what, times["this"], times["that"], None))
            show(rows[-1:])
    return rows


def _called(library, run, turns):
    def call():
        with mock.patch.object(cpu, "_library", lambda: library):
            run(*next(turns))
    return call


def parser() -> Parser:
    made = Parser(prog="python -m bench.kernels", description=__doc__)
    made.add_argument("commit", metavar="COMMIT", help="what git calls it: HEAD, HEAD~3, a hash")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=["lsq", "nulsq", "lcq"], help="(lsq nulsq lcq)")
    made.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="(2 3 4)")
    add_options(made, rounds=61)
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if not cpu.available():
        raise InputError("no C++ compiler on this machine, so no kernel")
    begin(arguments)
    with scratch("nulsq-kernels-") as folder:
        library = library_of(arguments.commit, folder)
        print(table([]))
        write_json(arguments.json, measure(library, arguments.methods, arguments.bits, arguments.rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
