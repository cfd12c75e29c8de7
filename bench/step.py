"""The time of a whole training step, quantized relative to float, with the trainer's own parts.

    python -m bench.step --smoke                     the most important rows, under six minutes
    python -m bench.step [--settings compiled eager ...] [--methods nulsq-a ...] [--bits 2 3 4] [--json FILE]

A step is what `nulsq.train` does with a batch: forward, loss, backward, divergence guard, both optimizers, counters.
Every step takes the same image tensor, so no loader takes part. Float is the same recipe without quantizers, in the
same setting. Settings:

    compiled      torch.compile, channels last          eager-nchw    eager, contiguous
    eager         channels last                          no-compiler   eager, with no C++ compiler on the machine
    traced        compiled, with the reference form in the graph in place of the fused operator
    bf16, bf16-eager   under autocast                    preresnet18, preresnet18-eager   32 images of 224 pixels
    memory, memory-eager     peak of the bytes that a step allocates
    cuda-graph, compiled-cuda-graph    eager and compiled, replayed: the time of the GPU alone (--device cuda)
    syncs         how often the host waits for a number from the device in a step (a count; the target is 0)
    graphs        graph breaks of a compiled step, and compilations over 14 activation shapes (counts)

`--profile` prints the milliseconds of an eager step's operations instead, of float and of quantized steps.
"""

from typing import Any

import torch

from bench.counts import compilations, graph_breaks, operations, peak_bytes, synchronizations
from bench.timing import Row, add_options, begin, clock_of, interleaved, row, show, table, timed_row, write_json
from nulsq.config import load_recipe
from nulsq.distributed import Ranks
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.models.network import build_network
from nulsq.quant.calibration.calibrate import calibrate_
from nulsq.quant.fold import fold_
from nulsq.quant.op import force
from nulsq.quant.projection import quantizers_of
from nulsq.text import markdown_table
from nulsq.training.compile import compiled
from nulsq.training.divergence import DivergenceGuard
from nulsq.training.metrics import Counters
from nulsq.training.optim import Optimizers
from nulsq.training.state import TrainState
from nulsq.training.step import training_step

METHODS = {"nulsq-a": ("nuLSQ-A", "lsq", "nulsq"), "nulsq-wa": ("nuLSQ-WA", "nulsq", "nulsq"),
           "lsq": ("LSQ", "lsq", "lsq"), "lcq": ("LCQ", "lcq", "lcq"), "apot": ("APoT", "apot", "apot"),
           "uniq": ("UniQ", "uniq", "uniq")}
FLOAT = ["quant.weight.quantizer=fp", "quant.activation.quantizer=fp", "quant.rules.edges.enabled=false"]
CPU = torch.device("cpu")
TIMED = ("compiled", "traced", "eager", "eager-nchw", "no-compiler", "bf16", "bf16-eager", "preresnet18",
         "preresnet18-eager", "cuda-graph", "compiled-cuda-graph")
COUNTED = ("memory", "memory-eager", "syncs", "graphs")
SMOKE = [("compiled", "nulsq-a", 2), ("compiled", "lsq", 2), ("eager", "nulsq-a", 2), ("eager", "nulsq-a", 4)]


def target(setting: str, method: str, bits: int) -> float | None:
    """The project's target for a ratio, or None."""
    if setting == "bf16" and method == "nulsq-a":
        return {3: 1.08, 4: 1.12}.get(bits, 1.05)
    if setting in ("compiled", "bf16", "compiled-cuda-graph"):
        return {"lcq": 1.30, "apot": 1.15, "uniq": 1.15}.get(method, 1.10 if bits == 4 else 1.05)
    if setting == "eager" and method == "nulsq-a":
        return 1.15 if bits == 2 else 1.18
    if setting in ("eager", "bf16-eager"):
        return {"lcq": 1.6, "apot": 1.25, "uniq": 1.25}.get(method, 1.18)
    return {"preresnet18": 1.05, "preresnet18-eager": 1.12, "memory": 1.05, "memory-eager": 1.25, "syncs": 0.0,
            "graph breaks": 0.0, "compilations": 2.0}.get(setting)


class Step:
    """Calling it makes one training step."""

    def __init__(self, overrides: list[str], setting: str, device: torch.device = CPU):
        large = setting.startswith("preresnet18")
        channels_last = setting != "eager-nchw"
        settings = [f"run.channels_last={str(channels_last).lower()}",
                    f"run.cuda_graph={str(setting.endswith('cuda-graph')).lower()}"]
        if setting.startswith("bf16"):
            settings.append("run.precision=bf16")
        if large:
            settings.append("model.name=pytorchcv:preresnet18")
        self.recipe = load_recipe("configs/recipes/cifar10/w2a2.yaml", [*overrides, *settings])
        torch.manual_seed(0)
        classes, batch, side = (1000, 32, 224) if large else (10, 128, 32)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = build_network(self.recipe, classes, start=False).to(device, memory_format=memory_format)
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, side, side, generator=generator)
        self.images = images.to(device).contiguous(memory_format=memory_format)
        self.labels = torch.randint(0, classes, (batch,), generator=generator).to(device)
        if quantizers_of(self.model):
            calibrate_(self.model, [self.images])
            fold_(self.model)
        self.model.train()
        network = self.model
        if setting in ("compiled", "traced", "bf16", "preresnet18", "memory", "compiled-cuda-graph"):
            network = compiled(self.model, device)
        plain = "eager" if device.type == "cpu" else "reference"  # the form that is used if there is no kernel
        self.form = {"no-compiler": plain, "traced": "reference"}.get(setting)
        ranks = Ranks(0, 1, device)
        self.state = TrainState(self.model, Optimizers(self.model, self.recipe.optim), Counters(device),
                                DivergenceGuard(self.recipe.guard, classes, ranks))
        self.step = training_step(self.recipe, ranks, self.state, network)

    def __call__(self) -> None:
        with force(self.form):
            loss, norm = self.step.gradients(self.images, self.labels, 0.0)
            self.state.guard.observe(self.state.step, loss, norm)
            self.step.update(0.01, 0.0)
        self.state.step += 1


def quantized(method: str, bits: int) -> list[str]:
    _, weight, activation = METHODS[method]
    return [f"quant.weight.quantizer={weight}", f"quant.activation.quantizer={activation}", f"quant.bits={bits}"]


def measure(setting: str, methods: list[tuple[str, int]], rounds: int, device: torch.device = CPU) -> list[Row]:
    """Rows of one setting for (method, bits), printed as they come. Every method has a float step in its rounds."""
    rows: list[Row] = []
    if setting in ("graphs", "syncs"):
        for method, bits in methods:
            rows += _counted(setting, method, bits, device)
        return rows
    for method in dict.fromkeys(method for method, _ in methods):
        torch._dynamo.reset()  # for more than eight networks of one class torch.compile would fall back to eager
        steps: dict[Any, Step] = {"float": Step(FLOAT, setting, device)}
        steps |= {bits: Step(quantized(method, bits), setting, device) for name, bits in methods if name == method}
        if setting in COUNTED:
            peaks = {name: peak_bytes(step, device.type) for name, step in steps.items()}
            new = [row(METHODS[method][0], bits, setting, peaks[bits] / peaks["float"], target(setting, method, bits),
                       megabytes=round(peaks[bits] / 2**20, 1)) for bits in peaks if bits != "float"]
        else:
            times = interleaved(steps, rounds, warm_up=6, clock=clock_of(device))  # the first ones also grow the heap
            new = [timed_row(METHODS[method][0], bits, setting, times[bits], times["float"],
                             target(setting, method, bits)) for bits in times if bits != "float"]
        rows += new
        show(new)
    return rows


def _counted(setting: str, method: str, bits: int, device: torch.device) -> list[Row]:
    step = Step(quantized(method, bits), setting, device)
    if setting == "syncs":
        counts = {setting: synchronizations(step, device.type)}
    else:
        quantizer = next(q for q in quantizers_of(step.model) if q.role == "activation" and q.bits == bits)
        counts = {"graph breaks": graph_breaks(step.model, step.images),
                  "compilations": compilations(quantizer, device.type)}
    rows = [row(METHODS[method][0], bits, name, float(count), target(name, method, bits))
            for name, count in counts.items()]
    show(rows)
    return rows


def profile(method: str, bits: int, count: int = 12) -> None:
    """Print the operations that take most of an eager step's time, and the sum of all others."""
    float_step, step = (operations(Step(overrides, "eager")) for overrides in (FLOAT, quantized(method, bits)))
    longest = list(step)[:count]
    cells = [["operation", "float, ms", f"{METHODS[method][0]} {bits} bits, ms"]]
    cells += [[name, f"{float_step.get(name, 0.0):.1f}", f"{step[name]:.1f}"] for name in longest]
    cells.append(["all others", *(f"{sum(value for name, value in times.items() if name not in longest):.1f}"
                                  for times in (float_step, step))])
    print(*markdown_table(cells), sep="\n", flush=True)


def parser() -> Parser:
    parser = Parser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only the most important rows: " + ", ".join(
        f"{setting} {method} {bits}" for setting, method, bits in SMOKE))
    parser.add_argument("--settings", nargs="+", choices=TIMED + COUNTED, default=["compiled", "eager"],
                        help="what to measure, see above (compiled eager)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="bit-widths (2 3 4)")
    parser.add_argument("--profile", action="store_true", help="print the time of an eager step's operations")
    add_options(parser, rounds=21, devices=("cpu", "cuda"))
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    graphs = [setting for setting in arguments.settings if setting.endswith("cuda-graph")]
    if graphs and arguments.device != "cuda":
        raise InputError(f"--settings {graphs[0]} needs --device cuda")
    if arguments.profile and arguments.device != "cpu":
        raise InputError("--profile runs on the CPU only; on a GPU use nsys or torch.profiler")
    device = begin(arguments)
    if arguments.profile:
        for method in arguments.methods:
            for bits in arguments.bits:
                profile(method, bits)
        return 0
    print(table([]))
    methods = {setting: [(method, bits) for method in arguments.methods for bits in arguments.bits]
               for setting in arguments.settings}
    if arguments.smoke:
        methods = {setting: [(method, bits) for smoke_setting, method, bits in SMOKE if smoke_setting == setting]
                   for setting in ("eager", "compiled")}
    rows = [line for setting, pairs in methods.items() for line in measure(setting, pairs, arguments.rounds, device)]
    write_json(arguments.json, rows)
    print(f"{len(rows)} rows, {sum(line['met'] is False for line in rows)} over their target")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
