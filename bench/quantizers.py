"""Time of a quantizer's forward and backward pass relative to a ReLU, for all methods, bit-widths and some libraries.

    python -m bench.quantizers [--json FILE]
    python -m bench.quantizers --scaling

Both sides run forward and backward through autograd on one 128 x 16 x 32 x 32 activation that needs a gradient; the
quantizer also computes the gradients of its parameters. Targets apply to the fused form on two cores; on a GPU
(`--device cuda`) there are none, see bench.bandwidth.
`--scaling` measures the time per element for bits 2 to 8, batches 32 to 512 and 16 to 256 channels.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import add_options, begin, clock_of, interleaved, ratios, show, table, timed_row, write_json
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.op import FORMS, force
from nulsq.quant.registry import get_quantizer

METHODS = {"lsq": "LSQ", "nulsq": "nuLSQ", "apot": "APoT", "lcq": "LCQ", "uniq": "UniQ", "minmax": "MinMax"}
TARGETS = {"lsq": {2: 1.3, 3: 1.3, 4: 1.3}, "nulsq": {2: 1.7, 3: 2.0, 4: 2.5}, "apot": {2: 2.0, 3: 2.0, 4: 2.0},
           "lcq": {2: 6.0, 3: 6.0, 4: 6.0}}
SHAPE, CPU = (128, 16, 32, 32), torch.device("cpu")


def activation(shape: tuple[int, ...], kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A normal tensor after a ReLU, and a gradient; channels last."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=draw).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return x.relu_().to(kind), dy.to(kind)


def both_passes(operation: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run():
        leaf = x.detach().requires_grad_()
        operation(leaf).backward(dy)
    return run


def quantizer(method: str, bits: int, x: Tensor):
    """An activation quantizer that is calibrated on x; None if the method does not support the bit-width."""
    try:
        result = get_quantizer(method)(bits, "activation", signed=False).to(x.device)
    except ValueError:
        return None
    result.reset_(Statistics.of(x))
    return result


def others(x: Tensor, bits: int) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[str]]:
    """Uniform quantizers of other libraries, with a learned step size if available; and the libraries not installed."""
    codes, step = 2**bits - 1, float(x.max()) / (2**bits - 1)
    scale, zero = torch.tensor([step], requires_grad=True), torch.zeros(1, requires_grad=True)
    operations = {
        "torch.fake_quantize_per_tensor_affine (step fixed)":
            lambda x: torch.fake_quantize_per_tensor_affine(x, step, 0, 0, codes),
        "torch._fake_quantize_learnable_per_tensor_affine":
            lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, codes, 1.0),
    }
    missing = []
    if importlib.util.find_spec("torchao"):
        from torchao.quantization.quant_primitives import _fake_quantize_affine
        operations["torchao _fake_quantize_affine (step fixed)"] = lambda x: _fake_quantize_affine(
            x, x.shape, scale.detach(), zero.detach().int(), torch.int32, 0, codes)
    else:
        missing.append("torchao")
    if importlib.util.find_spec("brevitas"):
        from brevitas.nn import QuantIdentity
        from brevitas.quant import Uint8ActPerTensorFloat
        operations["brevitas QuantIdentity (learned scale)"] = QuantIdentity(
            act_quant=Uint8ActPerTensorFloat, bit_width=bits, scaling_impl_type="parameter",
            scaling_init=float(x.max()))
    else:
        missing.append("brevitas")
    return operations, missing


def measure(methods: list[str], bits: list[int], rounds: int, form: str | None, kind: torch.dtype,
            device: torch.device = CPU) -> list[dict]:
    x, dy = (tensor.to(device) for tensor in activation(SHAPE, kind))
    setting, rows = f"{form or 'fused'} {str(kind).removeprefix('torch.')}", []
    for method in methods:
        for width in bits:
            if (measured := quantizer(method, width, x.float())) is None:
                continue
            with force(form):
                times = interleaved({"relu": both_passes(torch.relu, x, dy), "q": both_passes(measured, x, dy)},
                                    rounds, 5, clock=clock_of(device))
            has_target = form in (None, "fused") and device.type == "cpu"
            rows.append(timed_row(METHODS[method], width, setting, times["q"], times["relu"],
                                  TARGETS.get(method, {}).get(width) if has_target else None))
            show(rows[-1:])
    return rows


def measure_others(bits: list[int], rounds: int) -> list[dict]:
    x, dy = activation(SHAPE)
    rows = []
    for width in bits:
        operations, missing = others(x, width)
        times = interleaved({"relu": both_passes(torch.relu, x, dy)}
                            | {name: both_passes(operation, x, dy) for name, operation in operations.items()}, rounds)
        rows += [timed_row(name, width, "others float32", times[name], times["relu"], None) for name in operations]
    for name in missing:
        print(f"{name} is not installed: it has no row")
    print(table(rows))
    return rows


def scaling(methods: list[str], rounds: int) -> list[dict]:
    """Nanoseconds per element; varies one of bits, batch and channels at a time around 4 bits, 128 and 16."""
    cases = ([(bits, 128, 16) for bits in range(2, 9)] + [(4, batch, 16) for batch in (32, 64, 256, 512)]
             + [(4, 128, channels) for channels in (32, 64, 256)])
    print("| method | bits | batch | channels | ns / element | ReLU's | ratio |", "|---" * 7 + "|", sep="\n")
    rows = []
    for method in methods:
        for bits, batch, channels in cases:
            x, dy = activation((batch, channels, 32 if channels < 64 else 16, 32 if channels < 64 else 16))
            if (measured := quantizer(method, bits, x)) is None:
                continue
            times = interleaved({"relu": both_passes(torch.relu, x, dy), "q": both_passes(measured, x, dy)}, rounds, 5)
            line = timed_row(METHODS[method], bits, f"scaling batch {batch} channels {channels}", times["q"],
                             times["relu"], None)
            nanoseconds, relu = (line[key] * 1e6 / x.numel() for key in ("milliseconds", "base_milliseconds"))
            rows.append(line | {"nanoseconds_per_element": round(nanoseconds, 3)})
            print(f"| {METHODS[method]} | {bits} | {batch} | {channels} | {nanoseconds:.2f} | {relu:.2f} | "
                  f"{ratios(times['q'], times['relu'])[0]:.2f} |", flush=True)
    return rows


def parser() -> Parser:
    parser = Parser(prog="python -m bench.quantizers", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="bit-widths (2 3 4)")
    add_options(parser, rounds=31, devices=("cpu", "cuda"))
    parser.add_argument("--form", choices=FORMS, help="force this form of the operation (default: as in training)")
    parser.add_argument("--bf16", action="store_true", help="activations and gradients in bfloat16")
    parser.add_argument("--scaling", action="store_true", help="time per element over bits, batches and channels")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.scaling and arguments.device != "cpu":
        raise InputError("--scaling runs on the CPU only; on a GPU use bench.bandwidth")
    device = begin(arguments)
    if arguments.scaling:
        rows = scaling([method for method in arguments.methods if method != "minmax"], arguments.rounds)
    else:
        print(table([]))
        kind = torch.bfloat16 if arguments.bf16 else torch.float32
        rows = measure(arguments.methods, arguments.bits, arguments.rounds, arguments.form, kind, device)
        if not arguments.bf16 and device.type == "cpu":
            rows += measure_others(arguments.bits, arguments.rounds)
    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
