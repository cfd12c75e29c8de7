"""get_quantizer("nulsq"): quantizer classes by the name of their Python module."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

import nulsq.quantizers as package
from nulsq.errors import did_you_mean

if TYPE_CHECKING:  # listing names needs no torch, see nulsq/__init__.py
    from nulsq.quant.base import Quantizer


def available() -> tuple[str, ...]:
    """Names of the quantizers in nulsq/quantizers/."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def get_quantizer(name: str) -> "type[Quantizer]":
    """The `Quantizer` class of `nulsq/quantizers/NAME.py`, or of a module of yours, such as `my_lab.my_quantizer`.

    Raises ValueError, with the near miss, for a name that does not exist, and for a module that does not define exactly
    one quantizer.
    """
    from nulsq.quant.base import Quantizer

    path = name if "." in name else f"{package.__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise  # the module exists; something that it imports does not
        hint = did_you_mean(name, available())
        raise ValueError(f"no quantizer {name!r}.{hint} Allowed: fp (none), {', '.join(available())}, "
                         "or the importable name of a module of yours (my_lab.my_quantizer)") from None
    quantizers = [value for value in vars(module).values()
                  if isinstance(value, type) and issubclass(value, Quantizer) and value.__module__ == module.__name__]
    if len(quantizers) != 1:
        raise ValueError(f"{path} must define exactly one Quantizer, it defines {len(quantizers)}")
    return quantizers[0]
