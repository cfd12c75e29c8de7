"""Memory bandwidth of the kernels, counted by bytes read and written, as a share of the bandwidth of a copy.

    python -m bench.bandwidth [--device cuda] [--json FILE]

A forward pass reads x and writes y; a backward pass reads x and dy and writes dx. After a batch norm, which is part of
the pass, backward reads x and dy twice. The reference is a copy of the same tensor, interleaved. The `ratio` of a row
is this share, so a target is met if the share is at least as high.
On a GPU the clock stops when the device has finished, and each measurement has five launches.
"""

import math

import torch

from bench.timing import add_options, begin, clock_of, interleaved, ratios, row, write_json
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import available
from nulsq.quant.op.fused import KERNELS
from nulsq.quant.op.reference import Affine, Table
from nulsq.quant.registry import get_quantizer

TARGETS = {("float32", "forward"): {2: 0.80, 3: 0.80, 4: 0.80}, ("float32", "backward"): {2: 0.80, 3: 0.80, 4: 0.60},
           ("bfloat16", "forward"): {2: 0.80, 3: 0.80, 4: 0.80}, ("bfloat16", "backward"): {2: 0.80, 3: 0.60, 4: 0.45}}

IMAGE = (64, 32, 32)  # channels, height and width of an activation, channels last
# The number of tensors that each pass reads and writes.
PASSES = {"forward": 2, "backward": 3, "forward after a batch norm": 2, "backward after a batch norm": 5}


def measure(method: str, bits: int, kind: torch.dtype, device: torch.device, elements: int, rounds: int) -> list[dict]:
    """Rows for a tensor of this many elements, rounded to whole images."""
    draw, images = torch.Generator(device).manual_seed(0), -(-elements // math.prod(IMAGE))
    x, dy = (torch.randn(images, *IMAGE, generator=draw, device=device).to(kind, memory_format=torch.channels_last)
             for _ in range(2))
    x.relu_()
    quantizer = get_quantizer(method)(bits, "activation", signed=False).to(device)
    quantizer.reset_(Statistics.of(x[:16].float()))
    table, rule = Table(*(t if t is None else t.detach() for t in quantizer.table())), quantizer.rule()
    kernel, copy, name = KERNELS[device.type], torch.empty_like(x), str(kind).removeprefix("torch.")
    mean, var = kernel.moments(x)
    affine, folded = Affine(mean, var.rsqrt(), torch.zeros_like(mean), var.rsqrt()), rule._replace(relu=True)
    sides = {"copy": lambda: copy.copy_(x), "forward": lambda: kernel.quantize(x, table, rule),
             "backward": lambda: kernel.gradients(x, dy, table, rule),
             "forward after a batch norm": lambda: kernel.quantize(x, table, folded, affine),
             "backward after a batch norm": lambda: kernel.gradients(x, dy, table, folded, affine)}
    repeat = 5 if device.type == "cuda" else 1  # launches run ahead of the clock
    times = interleaved(sides, rounds, 3, repeat, clock_of(device))
    rows = []
    for side, tensors in PASSES.items():
        share = tensors / 2 * ratios(times["copy"], times[side])[0]
        target = TARGETS.get((name, side), {}).get(bits) if device.type == "cuda" and method == "nulsq" else None
        rows.append(row(method, bits, f"{device.type} {name} {side}", share, target)
                    | {"met": None if target is None else share >= target})
        print(f"| {method} | {bits} | {name} | {side} | {share:.2f} | {'' if target is None else target} |", flush=True)
    return rows


def parser() -> Parser:
    parser = Parser(prog="python -m bench.bandwidth", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["nulsq", "lsq"], help="(nulsq lsq)")
    parser.add_argument("--elements", type=int, default=50_000_000, help="size of the tensor (%(default)s)")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu", "cuda")
    add_options(parser, rounds=15, devices=devices)
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if not available(arguments.device):
        raise InputError(f"--device {arguments.device}: there is no kernel for it here")
    device = begin(arguments)
    print("| method | bits | type | pass | share of a copy's bandwidth | target |", "|---" * 6 + "|", sep="\n")
    rows = [line for method in arguments.methods for bits in (2, 3, 4) for kind in (torch.float32, torch.bfloat16)
            for line in measure(method, bits, kind, device, arguments.elements, arguments.rounds)]
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
