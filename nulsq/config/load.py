"""Typed YAML: recipes (`nulsq.config.recipe`), searches and site files are frozen dataclasses that one loader reads.

    recipe = load_recipe("configs/recipes/digits/w2a2.yaml", ["optim.lr=0.02", "quant.bits=3"])

A file may build on another one. The path is relative to the file, and the other file may have a base too:

    base: rn18.yaml

Later sources win: defaults < base file < file < dotted overrides (strings as above, or a dict of the same keys with
typed values). Two things are not simply merged:

    name          is not inherited: it belongs to the file that sets it
    quant.rules   a file's rules precede those of its base, because the first rule that matches a layer wins; a rule
                  that both have is merged and takes the file's position. A default rule comes first, except where a
                  file names it or inherits it from its base.

An unknown key, a wrong type or an impossible value is an InputError that names the key, what is allowed and the near
miss. No other file imports OmegaConf.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nulsq.config.checks import check_recipe
from nulsq.config.recipe import Recipe
from nulsq.errors import InputError, require
from nulsq.quant.settings import Policy

T = TypeVar("T")


def load(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] | Mapping[str, Any] = ()) -> T:
    """An instance of the dataclass `cls`: defaults, then the YAML file with its base files, then the overrides.

    Raises InputError for anything that does not fit. Nothing but these YAML files has been read by then.
    """
    omegaconf = require("omegaconf", "train")
    files = _read_chain(Path(path)) if path is not None else []
    where = "overrides"
    try:
        merged = omegaconf.OmegaConf.structured(cls)
        for file, content in files:
            where = str(file)
            merged = omegaconf.OmegaConf.merge(merged, content)
        for override in _nested(overrides, merged):
            where = "override"
            merged = omegaconf.OmegaConf.merge(merged, override)
        loaded = omegaconf.OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(_explain(error, where)) from None
    _check_limits(loaded, "")
    if isinstance(loaded, Recipe):
        rules = loaded.quant.rules
        ordered = {name: rules[name] for name in _rule_order(files)} | rules  # rules of overrides come last
        loaded = dataclasses.replace(loaded, quant=dataclasses.replace(loaded.quant, rules=ordered))
    return loaded


def load_recipe(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """Load and check a recipe. Without a `name` of its own it is named after its folder and file: the recipe in
    `configs/recipes/digits/w2a2.yaml` is digits-w2a2.
    """
    recipe = load(Recipe, path, overrides)
    check_recipe(recipe)
    path = Path(path).resolve()
    return recipe if recipe.name else dataclasses.replace(recipe, name=f"{path.parent.name}-{path.stem}")


def resolved(path: str | Path) -> str:
    """The YAML text of a file with its base files merged in, for a copy that has to load without them.

    The text loads to the same settings. A file without a base is returned as it is.
    """
    omegaconf = require("omegaconf", "train")
    files = _read_chain(Path(path))
    if len(files) == 1:
        return Path(path).read_text()
    merged = omegaconf.OmegaConf.merge(*(content for _, content in files))
    if any(map(_rule_names, (content for _, content in files))):
        merged.quant.rules = {name: merged.quant.rules.get(name, {}) for name in _rule_order(files)}
    return omegaconf.OmegaConf.to_yaml(merged)


def to_yaml(value: Any) -> str:
    """The dataclass as YAML text with every setting and without `base`; `load` reads it back equal."""
    return require("omegaconf", "train").OmegaConf.to_yaml(value)


def describe(cls: type, prefix: str = "") -> list[str]:
    """One line for each setting of a dataclass: key, default, explanation. For `--help`."""
    lines = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if dataclasses.is_dataclass(default) and "help" not in f.metadata:
            lines += describe(type(default), f"{prefix}{f.name}.")
        elif "help" in f.metadata:
            lines.append(f"  {f'{prefix}{f.name}={default}':<44} {f.metadata['help']}")
    return lines


# ---- files


def _read_chain(path: Path) -> list[tuple[Path, dict[Any, Any]]]:
    """A file and its base files with their contents, the file itself last, without `base` and inherited names.

    Raises InputError for a file that is missing, is not a mapping, or is its own base.
    """
    chain: list[tuple[Path, dict[Any, Any]]] = []
    while True:
        files = [file for file, _ in chain]
        if path.resolve() in [file.resolve() for file in files]:
            raise InputError(f"base files form a circle: {' -> '.join(map(str, [*files, path]))}")
        content = _read(path, files[-1] if files else None)
        base = content.pop("base", None)
        if chain:
            content.pop("name", None)
        chain.append((path, content))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str) or not base:
            raise InputError(f"{path}: base = {base!r}, allowed: the path of another YAML file, relative to this one")
        path = path.parent / base


def _read(path: Path, wanted_by: Path | None) -> dict[Any, Any]:
    """The content of a YAML file. `wanted_by`: the file that names it as its base."""
    why = f"{wanted_by}: base: " if wanted_by is not None else ""
    if not path.is_file():
        names = [near.name for near in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = ", ".join(str(path.parent / name) for name in difflib.get_close_matches(path.name, names, 6, cutoff=0))
        raise InputError(f"{why}no file {path}" + (f"; there are: {near}" if near else ""))
    omegaconf, yaml = require("omegaconf", "train"), require("yaml", "train")
    try:
        content = omegaconf.OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{why}{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not omegaconf.OmegaConf.is_dict(content):
        raise InputError(f"{why}{path} must hold a mapping of settings")
    return omegaconf.OmegaConf.to_container(content, resolve=False)


def _rule_order(files: list[tuple[Path, dict[Any, Any]]]) -> list[str]:
    """Names of the default rules and of those in the files, in the order in which they are tried."""
    order = list(Policy().rules)
    for i, (_, content) in enumerate(files):
        own = _rule_names(content)
        inherited = [name for name in order if name not in own]
        order = own + inherited if i else inherited + own
    return order


def _rule_names(content: Mapping[Any, Any]) -> list[str]:
    quant = content.get("quant")
    rules = quant.get("rules") if isinstance(quant, Mapping) else None
    return list(rules) if isinstance(rules, Mapping) else []


# ---- overrides


def _nested(overrides: Iterable[str] | Mapping[str, Any], config: Any) -> Iterator[Any]:
    """Dotted overrides of `config` as nested OmegaConf mappings."""
    omegaconf, yaml = require("omegaconf", "train"), require("yaml", "train")
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _refuse_base(key)
            for part in reversed(key.split(".")):
                value = {part: value}
            yield omegaconf.OmegaConf.create(value)
        return
    for text in overrides:
        if "=" not in text or text.startswith(("=", "-")):
            raise InputError(f"override {text!r} is not of the form key.path=value")
        key, _, value = text.partition("=")
        _refuse_base(key)
        try:
            override = omegaconf.OmegaConf.from_dotlist([text])
        except yaml.YAMLError as error:
            raise InputError(f"override {text!r}: {' '.join(str(error).split())}") from None
        if (not value.lstrip().startswith("{") and isinstance(omegaconf.OmegaConf.select(config, key), str)
                and omegaconf.OmegaConf.is_dict(omegaconf.OmegaConf.select(override, key))):
            # YAML reads `last: 5` as a mapping, where the setting is text (data.holdout="last: 5").
            override = omegaconf.OmegaConf.from_dotlist([f"{key}={json.dumps(value)}"])
        yield override


def _refuse_base(key: str) -> None:
    if key.partition(".")[0].strip() == "base":
        raise InputError(f"override {key}: base is a line of a YAML file, not a setting; give the file itself on the "
                         "command line, or write a file with `base: OTHER.yaml`")


# ---- errors


def _explain(error: Any, where: str) -> str:
    """An OmegaConf error as one line: file or override, key, what is wrong, what is allowed."""
    key = getattr(error, "full_key", None)
    text = str(error).partition("\n")[0]
    allowed = ""
    owner = getattr(error, "object_type", None)
    if "not in" in text and dataclasses.is_dataclass(owner):
        allowed = f" Allowed: {', '.join(f.name for f in dataclasses.fields(owner))}."
    return f"{where}: {f'{key}: ' if key else ''}{text}.{allowed}".replace("..", ".").replace("?.", "?")


def _check_limits(value: Any, prefix: str) -> None:
    """Compare the numbers of a dataclass, nested ones included, with the limits of their fields."""
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
