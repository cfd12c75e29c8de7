"""A whole training step, quantized beside float, through the trainer's own parts; ratios in one run.

    python -m bench.step --smoke                     the headline rows, under six minutes
    python -m bench.step [--settings compiled eager ...] [--methods nulsq-a ...] [--bits 2 3 4] [--json FILE]

A step is what `nulsq.train` does with a batch: forward, loss, backward, the guard's look, both optimizers, counters;
one image tensor over and over, so no loader takes part. Float is the same recipe with the quantizers off, in the same
setting.

    compiled      torch.compile, channels last          eager-nchw    eager, contiguous
    eager         channels last                          no-compiler   eager, with no C++ compiler on the machine
    traced        compiled, with the reference form in the graph in place of the fused operator
    bf16, bf16-eager   under autocast                    preresnet18, preresnet18-eager   32 images of 224 pixels
    memory, memory-eager     bytes that a step allocates at its peak
    cuda-graph, compiled-cuda-graph    eager and compiled, replayed: what it costs the GPU alone (--device cuda)
    syncs         reads of a device number by the host in a step (the ratio is their count, the target none)
    graphs        graph breaks of a compiled step, compilations over 14 activation shapes (likewise counts)

`--profile` has the milliseconds of an eager step's operations instead, float beside quantized.
"""

import torch

from bench.counts import compilations, graph_breaks, operations, peak_bytes, synchronizations
from bench.timing import add_options, begin, clock_of, interleaved, row, show, table, timed_row, write_json
from nulsq.config import load_recipe
from nulsq.distributed import Ranks
from nulsq.errors import InputError, Parser, exit_on_input_error
from nulsq.models.network import build_network
from nulsq.quant.calibration.calibrate import calibrate_
from nulsq.quant.fold import fold_
from nulsq.quant.op import force
from nulsq.quant.projection import quantizers_of
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
    """The project's target for a ratio; None where it has none."""
    if setting in ("compiled", "compiled-cuda-graph"):
        return {"lcq": 1.30, "apot": 1.15, "uniq": 1.15}.get(method, 1.10 if bits == 4 else 1.05)
    if setting == "bf16":
        return {"lcq": 1.30, "apot": 1.15, "uniq": 1.15}.get(method, {3: 1.08, 4: 1.12}.get(bits, 1.05))
    if setting in ("eager", "bf16-eager"):
        return {"lcq": 1.6, "apot": 1.25, "uniq": 1.25}.get(method, 1.15 if bits == 2 else 1.18)
    return {"preresnet18": 1.05, "preresnet18-eager": 1.12, "memory": 1.05, "memory-eager": 1.25, "syncs": 0.0,
            "graph breaks": 0.0, "compilations": 2.0}.get(setting)


class Step:
    """Calling it makes one training step."""

    def __init__(self, overrides: list[str], setting: str, device: torch.device = CPU):
        large = setting.startswith("preresnet18")
        channels_last = setting != "eager-nchw"
        more = [f"run.channels_last={str(channels_last).lower()}",
                f"run.cuda_graph={str(setting.endswith('cuda-graph')).lower()}"]
        if setting.startswith("bf16"):
            more.append("run.precision=bf16")
        if large:
            more.append("model.name=pytorchcv:preresnet18")
        self.recipe = load_recipe("configs/recipes/cifar10/w2a2.yaml", [*overrides, *more])
        torch.manual_seed(0)
        classes, batch, side = (1000, 32, 224) if large else (10, 128, 32)
        memory = torch.channels_last if channels_last else torch.contiguous_format
        self.model = build_network(self.recipe, classes, start=False).to(device, memory_format=memory)
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 3, side, side, generator=draw).to(device).contiguous(memory_format=memory)
        self.labels = torch.randint(0, classes, (batch,), generator=draw).to(device)
        if quantizers_of(self.model):
            calibrate_(self.model, [self.images])
            fold_(self.model)
        self.model.train()
        stepped = self.model
        if setting in ("compiled", "traced", "bf16", "preresnet18", "memory", "compiled-cuda-graph"):
            stepped = compiled(self.model, device)
        plain = "eager" if device.type == "cpu" else "reference"  # what is chosen where there is no kernel
        self.form = {"no-compiler": plain, "traced": "reference"}.get(setting)
        alone = Ranks(0, 1, device)
        self.state = TrainState(self.model, Optimizers(self.model, self.recipe.optim), Counters(device),
                                DivergenceGuard(self.recipe.guard, classes, alone))
        self.step = training_step(self.recipe, alone, self.state, stepped)

    def __call__(self) -> None:
        with force(self.form):
            loss, norm = self.step.gradients(self.images, self.labels, 0.0)
            self.state.guard.observe(self.state.step, loss, norm)
            self.step.update(0.01, 0.0)
        self.state.step += 1


def quantized(method: str, bits: int) -> list[str]:
    _, weight, activation = METHODS[method]
    return [f"quant.weight.quantizer={weight}", f"quant.activation.quantizer={activation}", f"quant.bits={bits}"]


def measure(setting: str, wanted: list[tuple[str, int]], rounds: int, device: torch.device = CPU) -> list[dict]:
    """Rows of one setting. Methods one after the other, each beside a float step of its own rounds."""
    rows = []
    if setting in ("graphs", "syncs"):
        for method, bits in wanted:
            rows += _counted(setting, method, bits, device)
        return rows
    for method in dict.fromkeys(method for method, _ in wanted):
        torch._dynamo.reset()  # more than eight networks of one class, and torch.compile would go eager
        steps = {"float": Step(FLOAT, setting, device)}
        steps |= {bits: Step(quantized(method, bits), setting, device) for name, bits in wanted if name == method}
        if setting in COUNTED:
            peaks = {name: peak_bytes(step, device.type) for name, step in steps.items()}
            found = [row(METHODS[method][0], bits, setting, peaks[bits] / peaks["float"], target(setting, method, bits),
                         megabytes=round(peaks[bits] / 2**20, 1)) for bits in peaks if bits != "float"]
        else:
            times = interleaved(steps, rounds, warm_up=6, clock=clock_of(device))  # the first ones also grow the heap
            found = [timed_row(METHODS[method][0], bits, setting, times[bits], times["float"],
                               target(setting, method, bits)) for bits in times if bits != "float"]
        rows += found
        show(found)
    return rows


def _counted(setting: str, method: str, bits: int, device: torch.device) -> list[dict]:
    step = Step(quantized(method, bits), setting, device)
    if setting == "syncs":
        counts = {setting: synchronizations(step, device.type)}
    else:
        quantizer = next(each for each in quantizers_of(step.model) if each.role == "activation" and each.bits == bits)
        counts = {"graph breaks": graph_breaks(step.model, step.images),
                  "compilations": compilations(quantizer, device.type)}
    found = [row(METHODS[method][0], bits, name, float(count), target(name, method, bits))
             for name, count in counts.items()]
    show(found)
    return found


def profile(method: str, bits: int, count: int = 12) -> None:
    """Print where the time of an eager step goes: the operations that take most of it, and all others together."""
    float_step, step = (operations(Step(overrides, "eager")) for overrides in (FLOAT, quantized(method, bits)))
    longest = list(step)[:count]
    print(f"| operation | float, ms | {METHODS[method][0]} {bits} bits, ms |", "|---" * 3 + "|", sep="\n")
    for name in longest:
        print(f"| {name} | {float_step.get(name, 0.0):.1f} | {step[name]:.1f} |")
    rest = (sum(value for name, value in each.items() if name not in longest) for each in (float_step, step))
    print("| all others | {:.1f} | {:.1f} |".format(*rest), flush=True)


def parser() -> Parser:
    made = Parser(prog="python -m bench.step", description=__doc__)
    made.add_argument("--smoke", action="store_true", help="only the headline rows: " + ", ".join(
        f"{setting} {method} {bits}" for setting, method, bits in SMOKE))
    made.add_argument("--settings", nargs="+", choices=TIMED + COUNTED, default=["compiled", "eager"],
                      help="(compiled eager)")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    made.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="(2 3 4)")
    made.add_argument("--profile", action="store_true", help="where an eager step's time goes, by operation")
    add_options(made, rounds=21, devices=("cpu", "cuda"))
    return made


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    graphs = [each for each in arguments.settings if each.endswith("cuda-graph")]
    if graphs and arguments.device != "cuda":
        raise InputError(f"--settings {graphs[0]} needs --device cuda")
    if arguments.profile and arguments.device != "cpu":
        raise InputError("--profile is of the CPU; on a GPU nsys or torch.profiler say more")
    device = begin(arguments)
    if arguments.profile:
        for method in arguments.methods:
            for bits in arguments.bits:
                profile(method, bits)
        return 0
    print(table([]))
    wanted = {setting: [(method, bits) for method in arguments.methods for bits in arguments.bits]
              for setting in arguments.settings}
    if arguments.smoke:
        wanted = {setting: [(method, bits) for kind, method, bits in SMOKE if kind == setting]
                  for setting in ("eager", "compiled")}
    rows = [each for setting, pairs in wanted.items() for each in measure(setting, pairs, arguments.rounds, device)]
    write_json(arguments.json, rows)
    missed = [each for each in rows if each["met"] is False]
    print(f"{len(rows)} rows, {len(missed)} over their target")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
