"""The CPU kernel compared with that of another commit, for each direction.

    python -m bench.kernels COMMIT [--methods nulsq lcq --bits 2 4 --json FILE]

Both are compiled with the flags of nulsq/quant/op/cpu/build.py and called in turn on the same tensors: outputs of a
batch norm, 128 x 16 x 32 x 32, channels last, to which the quantizer also applies the ReLU. Ratios are the time of this
kernel over the time of the other commit's kernel.
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

TENSORS = 8  # used in turn, so that no tensor is still cached from the previous round
ROOT = Path(__file__).resolve().parent.parent


def library_of(commit: str, folder: Path) -> ctypes.CDLL:
    """The kernel of a commit. Raises InputError if the commit has no kernel, or one with another call interface."""
    for source in build.SOURCES:
        name = f"{commit}:{source.relative_to(ROOT).as_posix()}"
        process = subprocess.run(["git", "show", name], cwd=ROOT, capture_output=True, text=True)
        if process.returncode:
            raise InputError(f"COMMIT {commit}: {process.stderr.strip().splitlines()[0]}")
        (folder / source.name).write_text(process.stdout)
    theirs, ours = ("".join(source.read_text() for source in sources)
                    for sources in ([folder / source.name for source in build.SOURCES], build.SOURCES))
    for name in ("Call", "Rule"):
        declarations = [re.search(rf"^struct {name} {{.*?^}};", text, re.S | re.M) for text in (theirs, ours)]
        if declarations[0] is None or declarations[0].group() != declarations[1].group():
            raise InputError(f"COMMIT {commit}: its kernel is called with a different struct {name}")
    with mock.patch.multiple(build, SOURCES=[folder / source.name for source in build.SOURCES]), \
            mock.patch.dict("os.environ", {"NULSQ_CACHE": str(folder)}):
        return cpu.load_library(build.compiled_library())


def measure(library: ctypes.CDLL, methods: list[str], bits: list[int], rounds: int) -> list[dict]:
    libraries = {"other": library, "this": cpu._library()}
    draw = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(SHAPE, generator=draw).contiguous(memory_format=torch.channels_last) for _ in range(2)]
             for _ in range(TENSORS)]
    rows = []
    for method, width in itertools.product(methods, bits):
        if (measured := quantizer(method, width, pairs[0][0].relu())) is None:
            continue
        with torch.no_grad():
            arguments = measured.table(measured._elements(pairs[0][0])), measured.rule()._replace(relu=True)
        for direction, run in (("forward", lambda x, dy, a=arguments: cpu.quantize(x, *a)),
                               ("backward", lambda x, dy, a=arguments: cpu.gradients(x, dy, *a))):
            turns = itertools.cycle(pairs)  # shared by both sides, so that neither finds cached tensors of the other
            sides = {name: _called(library, run, turns) for name, library in libraries.items()}
            times = interleaved(sides, rounds, warm_up=3)
            rows.append(timed_row(METHODS[method], width, direction, times["this"], times["other"], None))
            show(rows[-1:])
    return rows


def _called(library, run, turns):
    def call():
        with mock.patch.object(cpu, "_library", lambda: library):
            run(*next(turns))
    return call


def parser() -> Parser:
    parser = Parser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("commit", metavar="COMMIT", help="commit as git names it: HEAD, HEAD~3, a hash")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lsq", "nulsq", "lcq"],
                        help="(lsq nulsq lcq)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="bit-widths (2 3 4)")
    add_options(parser, rounds=61)
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if not cpu.available():
        raise InputError("no C++ compiler on this machine, so there is no kernel")
    begin(arguments)
    with scratch("nulsq-kernels-") as folder:
        library = library_of(arguments.commit, folder)
        print(table([]))
        write_json(arguments.json, measure(library, arguments.methods, arguments.bits, arguments.rounds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
