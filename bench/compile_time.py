"""Seconds from the start of a process to the end of its first compiled training step, with and without caches.

    python -m bench.compile_time [--json FILE]

Each case runs twice, in a new process each time, with a new cache folder: the first process compiles ("cold"), and the
second takes as long as every further trial of a search ("warm"). In the rows, `ratio` and `target` are seconds.
"""

import os
import subprocess
import sys
import tempfile
import time

from bench.step import FLOAT, METHODS, Step, quantized
from bench.timing import add_options, begin, row, table, write_json
from nulsq.errors import Parser, exit_on_input_error

TARGETS = {"cold": {2: 60.0, 3: 90.0, 4: 90.0}, "warm": {2: 10.0, 3: 10.0, 4: 10.0}}


def seconds(method: str, bits: int, cache: str, threads: int) -> float:
    """Duration of a process that makes one step."""
    command = [sys.executable, "-m", "bench.compile_time", "--first-step", method, str(bits), "--threads", str(threads)]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})
    return time.monotonic() - start


def parser() -> Parser:
    parser = Parser(prog="python -m bench.compile_time", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=["float", *METHODS], default=["float", "nulsq-a"],
                        help="(float nulsq-a)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4], help="bit-widths (2 4)")
    parser.add_argument("--first-step", nargs=2, metavar=("METHOD", "BITS"),
                        help="internal: be one of the measured processes")
    add_options(parser, rounds=None)
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    begin(arguments)
    if arguments.first_step:
        method, bits = arguments.first_step
        Step(FLOAT if method == "float" else quantized(method, int(bits)), "compiled")()
        return 0
    rows = []
    for method in arguments.methods:
        for bits in [2] if method == "float" else arguments.bits:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    target = None if method == "float" else TARGETS[state].get(bits)
                    rows.append(row(method, None if method == "float" else bits, f"first step, {state}: seconds",
                                    seconds(method, bits, cache, arguments.threads), target))
    print(table(rows))
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
