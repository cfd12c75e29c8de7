"""What Triton makes of the GPU kernels for sm_90, without a GPU: instructions an element, registers, spilled bytes.

    python -m bench.instructions [--methods nulsq lsq] [--json FILE]

The kernels are launched as in training, on a 128 x 16 x 32 x 32 activation, channels last; what is launched is compiled
instead of run. Counted is the loop over tiles. A multiprocessor of an H100 or H200 issues four instructions of 32 lanes
in a cycle, so `ratio` instructions an element take at least elements * ratio / (multiprocessors * 128 * clock) seconds:
of an H200 at 1.8 GHz, 50 million elements and 30 instructions 0.049 ms, as long as its memory takes to move 4 bytes for
each.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from bench.quantizers import SHAPE, activation, quantizer
from bench.timing import add_options, begin, row, write_json
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.quant.op.gpu import kernel as gpu
from nulsq.quant.op.reference import Affine, Table

LANES = 32
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


class Compiled(NamedTuple):
    kernel: str
    instructions: float  # an element, in the longest loop
    registers: int
    spilled: int  # bytes of a thread


class Launches:
    """Takes the place of triton_kernels and records launches."""

    def __init__(self, kernels):
        self.kernels, self.seen, self.tl = kernels, [], kernels.tl

    def __getattr__(self, name):
        function = getattr(self.kernels, name)

        class Launcher:
            def __getitem__(_, grid):
                return lambda *arguments, **options: self.seen.append((function, arguments, options))
        return Launcher()


def launches(made, x: torch.Tensor, dy: torch.Tensor, after_norm: bool) -> list:
    """What a quantizer's forward and backward launch for x, alone or after a batch norm."""
    table, rule = Table(*(t if t is None else t.detach() for t in made.table())), made.rule()
    affine = None
    if after_norm:
        affine = Affine(*(torch.ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(4)))
    recorder = Launches(gpu._kernels())
    with mock.patch.object(gpu, "_kernels", lambda: recorder):
        gpu.quantize(x, table, rule, affine)
        gpu.gradients(x, dy, table, rule, affine)
    return recorder.seen


def compile_for_sm_90(launch) -> Compiled:
    """Raises RuntimeError where Triton brings no tool that reads machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    function, arguments, options = launch
    warps, fused = options["num_warps"], options["enable_fp_fusion"]
    constants = {name: value for name, value in options.items() if name not in ("num_warps", "enable_fp_fusion")}
    given = dict(zip(function.arg_names, arguments, strict=False)) | constants
    signature, values, hints = {}, {}, {}
    for place, name in enumerate(function.arg_names):  # as Triton specializes a launch
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name], hints[(place,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif name in constants or value == 1:
            signature[name], values[(place,)] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(function, signature, values, hints), target=GPUTarget("cuda", 90, LANES),
                          options={"num_warps": warps, "enable_fp_fusion": fused})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (tools / "nvdisasm").is_file():
        raise RuntimeError("this triton brings no nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True,
                                      timeout=60).stdout
                       for tool, *flags in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")))
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups())
    tile = constants.get("ROWS", 1) * constants.get("COLS", 1)
    return Compiled(function.__name__, _longest_loop(code) / max(1, tile / (LANES * warps)), registers, stack + local)


def _longest_loop(code: str) -> int:
    """Instructions in it."""
    labels, count, longest = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            count += 1
            back = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return longest


def measure(method: str, bits: int, kind: torch.dtype, after_norm: bool) -> list[dict]:
    x, dy = activation(SHAPE, kind)
    if (made := quantizer(method, bits, x.float())) is None:
        return []
    made.does_relu = lambda: True
    where, rows = "after a batch norm" if after_norm else "alone", []
    for launch in launches(made, x, dy, after_norm):
        if launch[0].__name__ == "finish":  # a loop over programs
            continue
        found = compile_for_sm_90(launch)
        setting = f"{str(kind).removeprefix('torch.')} {found.kernel} {where}"
        rows.append(row(method, bits, setting, found.instructions, None)
                    | {"registers": found.registers, "spilled": found.spilled})
        print(f"| {method} | {bits} | {setting} | {found.instructions:.1f} | {found.registers} | {found.spilled} |",
              flush=True)
    return rows


def parser() -> Parser:
    made = Parser(prog="python -m bench.instructions", description=__doc__)
    made.add_argument("--methods", nargs="+", default=["nulsq", "lsq"], help="(nulsq lsq)")
    made.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], help="(2 3 4)")
    add_options(made, rounds=1)
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        gpu._kernels()
    except ImportError as error:
        raise InputError(f"triton is needed: {error}") from error
    begin(arguments)
    print("| method | bits | kernel | instructions an element | registers | spilled bytes |")
    print("|---" * 6 + "|")
    rows = [each for method in arguments.methods for bits in arguments.bits
            for kind in (torch.float32, torch.bfloat16) for after_norm in (False, True)
            for each in measure(method, bits, kind, after_norm)]
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
