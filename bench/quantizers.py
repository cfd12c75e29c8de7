"""Time of a quantizer's forward and backward pass relative to a ReLU's, for every method, width and some libraries.

    python -m bench.quantizers [--json FILE]
    python -m bench.quantizers --scaling

Both sides run on one activation, 128 x 16 x 32 x 32, that needs a gradient; a side is forward and backward through
autograd, with the quantizer's own parameters. Targets are those of the project for the fused form on two cores; on a
GPU (`--device cuda`) there are none, see bench.bandwidth.
`--scaling` has time per element for bits 2 to 8, batches 32 to 512 and 16 to 256 channels, relative to a ReLU's.
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
    """What a ReLU leaves of a normal tensor, and a gradient; channels last."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=draw).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return x.relu_().to(kind), dy.to(kind)


def both_passes(operation: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run():
        leaf = x.detach().requires_grad_()
        operation(leaf).backward(dy)
    return run


def quantizer(method: str, bits: int, x: Tensor):
    """An activation quantizer that has seen x; None where the method has no such width."""
    try:
        made = get_quantizer(method)(bits, "activation", signed=False).to(x.device)
    except ValueError:
        return None
    made.reset_(Statistics.of(x))
    return made


def others(x: Tensor, bits: int) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[str]]:
    """Uniform quantizers of others, each with one learned step where it has one; and which are not installed."""
    codes, step = 2**bits - 1, float(x.max()) / (2**bits - 1)
    scale, zero = torch.tensor([step], requires_grad=True), torch.zeros(1, requires_grad=True)
    found = {
        "torch.fake_quantize_per_tensor_affine (step fixed)":
            lambda x: torch.fake_quantize_per_tensor_affine(x, step, 0, 0, codes),
        "torch._fake_quantize_learnable_per_tensor_affine":
            lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, codes, 1.0),
    }
    missing = []
    if importlib.util.find_spec("torchao"):
        from torchao.quantization.quant_primitives import _fake_quantize_affine
        found["torchao _fake_quantize_affine (step fixed)"] = lambda x: _fake_quantize_affine(
            x, x.shape, scale.detach(), zero.detach().int(), torch.int32, 0, codes)
    else:
        missing.append("torchao")
    if importlib.util.find_spec("brevitas"):
        from brevitas.nn import QuantIdentity
        from brevitas.quant import Uint8ActPerTensorFloat
        theirs = QuantIdentity(act_quant=Uint8ActPerTensorFloat, bit_width=bits, scaling_impl_type="parameter",
                               scaling_init=float(x.max()))
        found["brevitas QuantIdentity (learned scale)"] = theirs
    else:
        missing.append("brevitas")
    return found, missing


def measure(methods: list[str], bits: list[int], rounds: int, form: str | None, kind: torch.dtype,
            device: torch.device = CPU) -> list[dict]:
    x, dy = (each.to(device) for each in activation(SHAPE, kind))
    setting, rows = f"{form or 'fused'} {str(kind).removeprefix('torch.')}", []
    for method in methods:
        for width in bits:
            if (made := quantizer(method, width, x.float())) is None:
                continue
            with force(form):
                times = interleaved({"relu": both_passes(torch.relu, x, dy), "q": both_passes(made, x, dy)}, rounds, 5,
                                    clock=clock_of(device))
            aimed = form in (None, "fused") and device.type == "cpu"
            rows.append(timed_row(METHODS[method], width, setting, times["q"], times["relu"],
                                  TARGETS.get(method, {}).get(width) if aimed else None))
            show(rows[-1:])
    return rows


def measure_others(bits: list[int], rounds: int) -> list[dict]:
    x, dy = activation(SHAPE)
    rows = []
    for width in bits:
        found, missing = others(x, width)
        times = interleaved({"relu": both_passes(torch.relu, x, dy)}
                            | {name: both_passes(operation, x, dy) for name, operation in found.items()}, rounds)
        rows += [timed_row(name, width, "others float32", times[name], times["relu"], None) for name in found]
    for name in missing:
        print(f"{name} is not installed: no row of it")
    print(table(rows))
    return rows


def scaling(methods: list[str], rounds: int) -> list[dict]:
    """Nanoseconds an element, one dimension varied at a time around 4 bits, batch 128, 16 channels."""
    cases = ([(bits, 128, 16) for bits in range(2, 9)] + [(4, batch, 16) for batch in (32, 64, 256, 512)]
             + [(4, 128, channels) for channels in (32, 64, 256)])
    print("| method | bits | batch | channels | ns / element | ReLU's | ratio |", "|---" * 7 + "|", sep="\n")
    rows = []
    for method in methods:
        for bits, batch, channels in cases:
            x, dy = activation((batch, channels, 32 if channels < 64 else 16, 32 if channels < 64 else 16))
            if (made := quantizer(method, bits, x)) is None:
                continue
            times = interleaved({"relu": both_passes(torch.relu, x, dy), "q": both_passes(made, x, dy)}, rounds, 5)
            found = timed_row(METHODS[method], bits, f"scaling batch {batch} channels {channels}", times["q"],
                              times["relu"], None)
            each, relu = (found[key] * 1e6 / x.numel() for key in ("milliseconds", "base_milliseconds"))
            rows.append(found | {"nanoseconds_per_element": round(each, 3)})
            print(f"| {METHODS[method]} | {bits} | {batch} | {channels} | {each:.2f} | {relu:.2f} | "
                  f"{ratios(times['q'], times['relu'])[0]:.2f} |", flush=True)
    return rows


def parser() -> Parser:
    made = Parser(prog="python -m bench.quantizers", description=__doc__)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    made.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="(2 3 4)")
    add_options(made, rounds=31, devices=("cpu", "cuda"))
    made.add_argument("--form", choices=FORMS, help="force this form of the operation (the usual choice)")
    made.add_argument("--bf16", action="store_true", help="activations and gradients in bfloat16")
    made.add_argument("--scaling", action="store_true", help="time per element over bits, batches and channels")
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.scaling and arguments.device != "cpu":
        raise InputError("--scaling is of the CPU; on a GPU bench.bandwidth has its speed by the byte")
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
