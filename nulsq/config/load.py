"""Typed YAML: recipes (`nulsq.config.recipe`), searches and site files are frozen dataclasses read by one loader.

    recipe = load_recipe("configs/recipes/digits/w2a2.yaml", ["optim.lr=0.02", "quant.bits=3"])

defaults < file < dotted overrides (strings as above, or a dict of the same keys with typed values). An unknown key,
a wrong type or an impossible value is an InputError that names the key, what is allowed and the near miss.
This file alone knows OmegaConf.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nulsq.config.checks import check_recipe
from nulsq.config.recipe import Recipe
from nulsq.errors import InputError, require

T = TypeVar("T")


def load(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] | Mapping[str, Any] = ()) -> T:
    """An instance of the dataclass `cls`: defaults, then the YAML file, then the overrides.

    Raises InputError for anything that does not fit; nothing else has been read or written by then.
    """
    omegaconf = require("omegaconf", "train")
    where = str(path) if path is not None else "overrides"
    try:
        merged = omegaconf.OmegaConf.structured(cls)
        if path is not None:
            merged = omegaconf.OmegaConf.merge(merged, _read(omegaconf, Path(path)))
        for override in _nested(omegaconf, overrides):
            where = "override"
            merged = omegaconf.OmegaConf.merge(merged, override)
        loaded = omegaconf.OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(_explain(error, cls, where)) from None
    _check_limits(loaded, "")
    return loaded


def load_recipe(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """A Recipe whose `name` is settled: `configs/recipes/digits/w2a2.yaml` is called digits-w2a2."""
    recipe = load(Recipe, path, overrides)
    check_recipe(recipe)
    path = Path(path).resolve()
    return recipe if recipe.name else dataclasses.replace(recipe, name=f"{path.parent.name}-{path.stem}")


def to_yaml(value: Any) -> str:
    """The dataclass as YAML text, every key written out; `load` reads it back equal."""
    return require("omegaconf", "train").OmegaConf.to_yaml(value)


def describe(cls: type, prefix: str = "") -> list[str]:
    """A line for each setting of a dataclass: key, default, explanation. For `--help`."""
    lines = []
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if dataclasses.is_dataclass(default) and "help" not in f.metadata:
            lines += describe(type(default), f"{prefix}{f.name}.")
        elif "help" in f.metadata:
            lines.append(f"  {f'{prefix}{f.name}={default}':<44} {f.metadata['help']}")
    return lines


def _read(omegaconf, path):
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))[:6]) if path.parent.is_dir() else ""
        raise InputError(f"no file {path}" + (f"; there are: {near}" if near else ""))
    yaml = require("yaml", "train")
    try:
        content = omegaconf.OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not omegaconf.OmegaConf.is_dict(content):
        raise InputError(f"{path} must hold a mapping of settings")
    return content


def _nested(omegaconf, overrides):
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            for part in reversed(key.split(".")):
                value = {part: value}
            yield omegaconf.OmegaConf.create(value)
        return
    yaml = require("yaml", "train")
    for text in overrides:
        if "=" not in text or text.startswith(("=", "-")):
            raise InputError(f"override {text!r} is not of the form key.path=value")
        try:
            yield omegaconf.OmegaConf.from_dotlist([text])
        except yaml.YAMLError as error:
            raise InputError(f"override {text!r}: {' '.join(str(error).split())}") from None


def _explain(error, cls, where):
    key = getattr(error, "full_key", None)
    text = str(error).partition("\n")[0]
    allowed = ""
    owner = getattr(error, "object_type", None)
    if "not in" in text and dataclasses.is_dataclass(owner):
        allowed = f" Allowed: {', '.join(f.name for f in dataclasses.fields(owner))}."
    return f"{where}: {f'{key}: ' if key else ''}{text}.{allowed}".replace("..", ".").replace("?.", "?")


def _check_limits(value, prefix):
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_limits(inner, f"{prefix}{key}.")
        return
    if not dataclasses.is_dataclass(value):
        return
    for f in dataclasses.fields(value):
        inner, key = getattr(value, f.name), f"{prefix}{f.name}"
        limits = f.metadata
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
            if ((low is not None and not inner >= low) or (high is not None and not inner <= high)
                    or (above is not None and not inner > above) or inner != inner):
                bounds = [f"at least {low}" if low is not None else "", f"above {above}" if above is not None else "",
                          f"at most {high}" if high is not None else ""]
                raise InputError(f"{key} = {inner}, allowed: {' and '.join(filter(None, bounds))}")
        elif inner is not None:
            _check_limits(inner, f"{key}.")
