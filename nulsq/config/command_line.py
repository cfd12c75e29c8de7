"""The command line of a training run: a recipe, dotted overrides, and the options of the published code.

    python -m nulsq.train RECIPE.yaml optim.lr=0.02 quant.bits=3
    python -m nulsq.train RECIPE.yaml --lr 0.04 --x_quantizer Positive_nuLSQ_quantizer --num_bits 2

The second form has the options of the reference implementation, each of which stands for some dotted overrides.
"""

import argparse

from nulsq.config import Recipe, describe, load_recipe
from nulsq.errors import InputError, Parser, did_you_mean

ALIASES = {
    "lr": ["optim.lr"],
    "coeff_qparm_lr": ["optim.coeff_qparm_lr"],
    "weight_decay": ["optim.weight_decay"],
    "qparm_wd": ["optim.qparm_wd"],
    "initializer": ["quant.weight.init", "quant.activation.init"],
    "num_bits": ["quant.bits"],
    "train_id": ["run.train_id"],
    "init_from": ["model.init_from"],
}
QUANTIZERS = {
    "MinMax_quantizer": "minmax", "LSQ_quantizer": "lsq", "LCQ_quantizer": "lcq", "APoT_quantizer": "apot",
    "Positive_nuLSQ_quantizer": "nulsq", "Symmetric_nuLSQ_quantizer": "nulsq", "FP": "fp",
}
SIGNED = {"Positive_nuLSQ_quantizer": "false", "Symmetric_nuLSQ_quantizer": "true"}
INITIALIZERS = {"NMSE_initializer": "nmse", "LSQ_initializer": "lsq", "Const_initializer": "const"}


def parser(prog: str, what: str) -> Parser:
    """An argument parser whose --help lists every setting of a recipe."""
    epilog = "\n".join([
        "a recipe file may build on another: the line `base: OTHER.yaml` takes its settings, `name` excepted", "",
        "settings (key=default):", *describe(Recipe),
        "  quant.weight.quantizer=lsq                   then .bits, .init, .per_channel, .normalization, .grad_scale, "
        ".ste, .learn_scale, .options.KEY",
        "  quant.activation.quantizer=nulsq             then the same, except .per_channel and .normalization",
        "  quant.rules.NAME.match=[PATTERN,...]         layers by name (layer1.*) or by role: role:first, role:last, "
        "role:depthwise,", f"{'':<47}role:downsample, role:qkv,",
        f"{'':<47}then .bits, .quantizer, .weight.bits, .activation.bits, .enabled and so on", "",
        f"values of --x_quantizer and --w_quantizer: {', '.join(QUANTIZERS)}",
        f"values of --initializer: {', '.join(INITIALIZERS)}", "",
        "examples:", f"  {prog} configs/recipes/digits/w2a2.yaml optim.epochs=5 quant.bits=3",
        "  torchrun --nproc-per-node 2 -m nulsq.train configs/recipes/cifar10/w2a2.yaml",
    ])
    parser = Parser(prog=prog, description=what, epilog=epilog)
    parser.add_argument("recipe", help="YAML file, as in configs/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    published = parser.add_argument_group("options of the published code, in place of these settings")
    for name, keys in ALIASES.items():
        published.add_argument(f"--{name}", help=", ".join(keys))
    published.add_argument("--x_quantizer", help="quant.activation.quantizer and quant.activation.signed")
    published.add_argument("--w_quantizer", help="quant.weight.quantizer")
    return parser


def parse(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, Recipe]:
    """The parsed arguments and their recipe. Raises InputError for an argument or setting that does not fit."""
    arguments = parser.parse_intermixed_args(argv)
    return arguments, load_recipe(arguments.recipe, published_overrides(arguments) + arguments.overrides)


def published_overrides(arguments: argparse.Namespace) -> list[str]:
    """The dotted overrides that the published code's options stand for."""
    overrides = []
    for name, keys in ALIASES.items():
        value = getattr(arguments, name)
        if value is None:
            continue
        if name == "initializer":
            value = _known(INITIALIZERS, "--initializer", value)
        if name == "init_from":
            value = f'"{value}"'  # YAML could read a path as something else than text
        overrides += [f"{key}={value}" for key in keys]
    sides = {"activation": arguments.x_quantizer, "weight": arguments.w_quantizer}
    for side, name in sides.items():
        if name is None:
            continue
        option = "--x_quantizer" if side == "activation" else "--w_quantizer"
        quantizer = _known(QUANTIZERS, option, name)
        if side == "weight" and name == "Positive_nuLSQ_quantizer":
            raise InputError(f"{option} {name}: weights are signed; use Symmetric_nuLSQ_quantizer")
        overrides.append(f"quant.{side}.quantizer={quantizer}")
        if side == "activation" and name in SIGNED:
            overrides.append(f"quant.activation.signed={SIGNED[name]}")
    if set(sides.values()) == {"FP"}:  # the float network: first and last layer too
        overrides.append("quant.rules.edges.enabled=false")
    return overrides


def _known(table: dict[str, str], option: str, name: str) -> str:
    """The value of an option's table. Raises InputError for a name that is not in it."""
    if name in table:
        return table[name]
    raise InputError(f"{option} {name}: not known.{did_you_mean(name, table)} Allowed: {', '.join(table)}")
