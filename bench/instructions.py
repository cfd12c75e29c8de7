"""Instructions per element, registers and spilled bytes of the GPU kernels compiled for sm_90; needs no GPU.

    python -m bench.instructions [--methods nulsq lsq] [--json FILE]

Kernels are launched as in training, on a 128 x 16 x 32 x 32 activation, channels last, and compiled instead of run. The
instructions are those of the loop over tiles. A multiprocessor of an H100 or H200 issues four instructions of 32 lanes
per cycle, so `ratio` instructions per element take at least elements * ratio / (multiprocessors * 128 * clock) seconds.
For 50 million elements and 30 instructions on an H200 at 1.8 GHz this is 0.049 ms, in which its memory moves 4 bytes
per element.
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
    instructions: float  # per element, in the longest loop
    registers: int
    spilled: int  # bytes per thread


class Launches:
    """Replaces the module triton_kernels and records launches."""

    def __init__(self, kernels):
        self.kernels, self.recorded, self.tl = kernels, [], kernels.tl

    def __getattr__(self, name):
        function = getattr(self.kernels, name)

        class Launcher:
            def __getitem__(_, grid):
                return lambda *arguments, **options: self.recorded.append((function, arguments, options))
        return Launcher()


def launches(measured, x: torch.Tensor, dy: torch.Tensor, after_norm: bool) -> list:
    """Launches of a quantizer's forward and backward pass for x, alone or after a batch norm."""
    table, rule = Table(*(t if t is None else t.detach() for t in measured.table())), measured.rule()
    affine = None
    if after_norm:
        affine = Affine(*(torch.ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(4)))
    recorder = Launches(gpu._kernels())
    with mock.patch.object(gpu, "_kernels", lambda: recorder):
        gpu.quantize(x, table, rule, affine)
        gpu.gradients(x, dy, table, rule, affine)
    return recorder.recorded


def compile_for_sm_90(launch) -> Compiled:
    """Compile a launch. Raises RuntimeError if Triton comes without the tool that disassembles machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    function, arguments, options = launch
    warps, fused = options["num_warps"], options["enable_fp_fusion"]
    constants = {name: value for name, value in options.items() if name not in ("num_warps", "enable_fp_fusion")}
    values_of = dict(zip(function.arg_names, arguments, strict=False)) | constants
    signature, constexprs, hints = {}, {}, {}
    for position, name in enumerate(function.arg_names):  # as Triton specializes a launch
        value = values_of[name]
        if isinstance(value, torch.Tensor):
            signature[name], hints[(position,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif name in constants or value == 1:
            signature[name], constexprs[(position,)] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                hints[(position,)] = [["tt.divisibility", 16]]
    binary = triton.compile(ASTSource(function, signature, constexprs, hints), target=GPUTarget("cuda", 90, LANES),
                            options={"num_warps": warps, "enable_fp_fusion": fused})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (tools / "nvdisasm").is_file():
        raise RuntimeError("this triton has no nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True,
                                      timeout=60).stdout
                       for tool, *flags in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")))
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups())
    tile = constants.get("ROWS", 1) * constants.get("COLS", 1)
    return Compiled(function.__name__, _longest_loop(code) / max(1, tile / (LANES * warps)), registers, stack + local)


def _longest_loop(code: str) -> int:
    """Number of instructions in the longest loop of disassembled code."""
    labels, count, longest = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            count += 1
            branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction[1])
            if branch and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest


def measure(method: str, bits: int, kind: torch.dtype, after_norm: bool) -> list[dict]:
    x, dy = activation(SHAPE, kind)
    if (measured := quantizer(method, bits, x.float())) is None:
        return []
    measured.does_relu = lambda: True
    context, rows = "after a batch norm" if after_norm else "alone", []
    for launch in launches(measured, x, dy, after_norm):
        if launch[0].__name__ == "finish":  # its loop is over programs, not tiles
            continue
        compiled = compile_for_sm_90(launch)
        setting = f"{str(kind).removeprefix('torch.')} {compiled.kernel} {context}"
        rows.append(row(method, bits, setting, compiled.instructions, None)
                    | {"registers": compiled.registers, "spilled": compiled.spilled})
        print(f"| {method} | {bits} | {setting} | {compiled.instructions:.1f} | {compiled.registers} | "
              f"{compiled.spilled} |", flush=True)
    return rows


def parser() -> Parser:
    parser = Parser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["nulsq", "lsq"], help="(nulsq lsq)")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], help="bit-widths (2 3 4)")
    add_options(parser, rounds=1)
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        gpu._kernels()
    except ImportError as error:
        raise InputError(f"triton is needed: {error}") from error
    begin(arguments)
    print("| method | bits | kernel | instructions per element | registers | spilled bytes |")
    print("|---" * 6 + "|")
    rows = [line for method in arguments.methods for bits in arguments.bits
            for kind in (torch.float32, torch.bfloat16) for after_norm in (False, True)
            for line in measure(method, bits, kind, after_norm)]
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
