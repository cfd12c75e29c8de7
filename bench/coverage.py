"""What of the networks of timm and torchvision is quantized, family by family.

    python -m bench.coverage --write docs/methods.md

A family is a module of timm (`timm.list_modules()`) or a file of torchvision's classification models. It is represented
by its network of fewest parameters, with random weights, at its default input size, quantized at 4 bits with preset
`none` (LSQ weights, nuLSQ activations). A family passes if the network calibrates, trains a step, evaluates, and loads
into a second network that computes the same.

    layers    convolutions and linear layers that are quantized, of all
    MACs      their share of the multiply-adds of all convolutions and linear layers
    products  share of the multiply-adds outside of these layers, most of them inside attention, that a rule for
              role:attention quantizes; "-" where there are none, "no adapter" where its attention is not known
"""

import json
import platform
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nulsq
from bench import command
from nulsq.cost import FLOAT_BITS, cost_of
from nulsq.errors import InputError, Parser, did_you_mean, exit_on_input_error, require
from nulsq.files import write_atomically
from nulsq.models.libraries import build_model
from nulsq.quant.attention_adapters import attentions_of
from nulsq.quant.policy import not_quantizable
from nulsq.quant.settings import LayerRule, Policy, SideRule
from nulsq.text import markdown_table, shortened

CLASSES = 10
LARGE = 448  # pixels: from here on one image instead of two, for memory
ATTENTION = {"products": LayerRule(match=["role:attention"])}
BEGIN, END = "<!-- bench.coverage -->", "<!-- end of bench.coverage -->"


@dataclass
class Row:
    """A family."""

    family: str
    network: str
    parameters: int = 0
    layers: int = 0
    quantized_layers: int = 0
    macs: int = 0  # of the layers
    quantized_macs: int = 0
    other_macs: int = 0  # outside of the layers
    quantized_products: int = 0  # of these, with a rule for attention
    has_adapter: bool = False
    stays_float: list[str] = field(default_factory=list)  # "2 x Class: reason"
    error: str = ""  # empty: the family passes

    @property
    def share(self) -> float:
        return self.quantized_macs / self.macs if self.macs else 0.0

    @property
    def products_share(self) -> float:
        return self.quantized_products / self.other_macs if self.other_macs else 1.0


# ---- one network


def measure(family: str, network: str, size: int) -> Row:
    """Quantize a network, train and evaluate it. What fails is in the row's `error`."""
    row = Row(family, network)
    try:
        _measure(row, size)
    except Exception as error:  # whatever a network's own code raises is a result
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row


def _measure(row: Row, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    if size > LARGE:
        x = x[:1]
    model = _quantized(row.network, _policy(), x)
    quantizers = {id(p) for quantizer in nulsq.quantizers_of(model) for p in quantizer.parameters()}
    row.parameters = sum(p.numel() for p in model.parameters() if id(p) not in quantizers)
    cost = cost_of(model, x[:1])
    row.layers, row.quantized_layers = len(cost.layers), sum(map(_is_quantized, cost.layers.values()))
    row.macs = sum(layer.macs for layer in cost.layers.values())
    row.quantized_macs = sum(layer.macs for layer in cost.layers.values() if _is_quantized(layer))
    row.other_macs = cost.other_macs
    reasons = Counter(f"{type(model.get_submodule(name)).__name__}: {reason}"
                      for name, reason in not_quantizable(model).items())
    row.stays_float = [f"{count} x {reason}" for reason, count in reasons.items()]
    _train_a_step(model, x)
    _round_trip(row.network, model, x)
    if cost.other_macs and attentions_of(model):
        row.has_adapter = True
        with_products = cost_of(_quantized(row.network, _policy(ATTENTION), x), x[:1])
        row.quantized_products = sum(product.macs for product in with_products.products.values())


def _policy(rules: dict[str, LayerRule] | None = None) -> Policy:
    """Initial steps by nmse: a formula, where mse would search for minutes. What is quantized does not depend on it."""
    return Policy(bits=4, preset="none", weight=SideRule("lsq", init="nmse"), activation=SideRule("nulsq", init="nmse"),
                  rules=rules or {})


def _quantized(network: str, policy: Policy, x: Tensor) -> nn.Module:
    model = build_model(network, CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stays float is in the row
        return nulsq.calibrate_(nulsq.quantize_(model, policy), [x])


def _is_quantized(layer: Any) -> bool:
    return FLOAT_BITS not in (layer.weight_bits, layer.activation_bits)


def _train_a_step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    nulsq.follow_step_(model, optimizer)
    output = model.train()(x)
    outputs = [output] if isinstance(output, Tensor) else [one for one in output if isinstance(one, Tensor)]
    loss = sum(F.cross_entropy(one.reshape(-1, CLASSES), torch.arange(len(one.reshape(-1, CLASSES))) % CLASSES)
               for one in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    missing = [name for name, module in model.named_modules() if isinstance(module, nulsq.Quantizer)
               and any(p.grad is None for p in module.parameters())]
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {float(loss)}")
    if missing:
        raise ValueError(f"no gradient for {shortened(missing)}")
    optimizer.step()
    optimizer.zero_grad()  # frees the memory of the gradients


@torch.no_grad()
def _round_trip(network: str, model: nn.Module, x: Tensor) -> None:
    output = model.eval()(x)
    if not torch.isfinite(output).all():
        raise ValueError("the output of evaluation is not finite")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = nulsq.quantize_(build_model(network, CLASSES), _policy()).eval()
    other.load_state_dict(model.state_dict())
    if not torch.equal(other(x), output):
        raise ValueError("a network that loaded the state dict computes something else")


# ---- the families


def families() -> dict[str, list[str]]:
    """Networks of each family, as `build_model` names them."""
    timm, models = require("timm", "train"), require("torchvision.models", "train")
    of = {f"timm {module}": [f"timm:{name}" for name in timm.list_models(module=module)]
          for module in timm.list_modules()}
    for name in models.list_models(module=models):
        file = models.get_model_builder(name).__module__.rpartition(".")[2]
        of.setdefault(f"torchvision {file}", []).append(f"torchvision:{name}")
    return {family: names for family, names in of.items() if names}


def smallest(names: list[str]) -> str:
    """The network of fewest parameters. Networks that cannot be built without memory do not count."""
    sizes = {}
    for name in names if len(names) > 1 else ():
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sizes[name] = sum(p.numel() for p in build_model(name, CLASSES).parameters())
        except Exception:  # whatever a network's own code raises on the meta device
            continue
    return min(sizes, key=lambda name: sizes[name]) if sizes else names[0]


def image_size(network: str) -> int:
    """The default input size of a network."""
    library, _, name = network.partition(":")
    if library == "timm":
        return int(require("timm", "train").get_pretrained_cfg(name).input_size[-1])
    return int(require("torchvision.models", "train").get_model_weights(name).DEFAULT.transforms().crop_size[0])


def measure_family(family: str, names: list[str]) -> Row:
    torch.set_num_threads(1)
    network = smallest(names)
    return measure(family, network, image_size(network))


# ---- the table


def table(rows: list[Row]) -> str:
    cells = [["family", "network", "layers", "MACs", "products", "stays float, or what failed"]]
    for row in rows:
        products = "-" if not row.other_macs else "no adapter"
        if row.other_macs and row.has_adapter:
            products = f"{100 * row.products_share:.1f} %"
        notes = row.error or "; ".join(row.stays_float) or "-"
        cells.append([row.family, row.network.partition(":")[2], f"{row.quantized_layers}/{row.layers}",
                      f"{100 * row.share:.1f} %", products, notes.replace("|", "/")])
    return "\n".join(markdown_table(cells))


def totals(rows: list[Row]) -> str:
    passed = [row for row in rows if not row.error]
    whole = [row for row in passed if row.share >= 0.99]
    return (f"{len(passed)} of {len(rows)} families pass ({100 * len(passed) / len(rows):.1f} %); {len(whole)} "
            f"({100 * len(whole) / len(rows):.1f} %) have at least 99 % of their layers' multiply-adds quantized.")


def insert(page: str, text: str) -> str:
    """The page with `text` between the two comments. Raises InputError for a page without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"--write: the page has no lines {BEGIN} and {END}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def parser() -> Parser:
    parser = Parser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument("--families", nargs="+", metavar="NAME", help='such as "timm eva" (default: all)')
    parser.add_argument("--jobs", type=int, default=2, help="networks at the same time (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--write", type=Path, metavar="FILE",
                        help=f"write the table into this page, between {BEGIN} and {END}")
    return parser


@exit_on_input_error
def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    known = families()
    for name in arguments.families or ():
        if name not in known:
            raise InputError(f"--families: no family {name!r}.{did_you_mean(name, known, count=3)}")
    chosen = {name: known[name] for name in arguments.families or known}
    page = arguments.write.read_text() if arguments.write else None
    if page is not None:
        insert(page, "")  # an error now, not after the measurement
    rows = []
    # A process each: what one network leaves behind is not the next one's.
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(measure_family, family, names) for family, names in chosen.items()]
        for future in futures:
            row = future.result()
            rows.append(row)
            print(f"{row.family}: {row.network}, {100 * row.share:.1f} %, {row.error or 'passes'}", flush=True)
    text = f"{totals(rows)}\n\n{table(rows)}"
    print(text)
    if arguments.json:
        write_atomically(arguments.json, json.dumps([asdict(row) for row in rows], indent=1))
    if page is not None:
        made = (f"Made by `{command('bench.coverage', argv)}` with torch {torch.__version__}, timm "
                f"{require('timm', 'train').__version__}, {platform.machine()}.")
        arguments.write.write_text(insert(page, f"{made}\n\n{text}"))
    return 0 if not any(row.error for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
