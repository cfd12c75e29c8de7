"""docs/api.md lists every public name; the walks of docs/architecture.md name files and functions that exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ("nulsq", "nulsq.config", "nulsq.data", "nulsq.inspect")
WALK = re.compile(r"((?:nulsq|tune|launch)/[\w/]+\.py) +([\w.]+)")


def sections() -> dict[str, list[str]]:
    """Module -> names in the first column of its table in docs/api.md."""
    text = (ROOT / "docs/api.md").read_text()
    found = {}
    for module, body in re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\| `(\w+)[^|]*\|(.*)\|$", body, re.MULTILINE)
        assert all(words.strip() for _, words in rows), f"docs/api.md: a name of {module} has no description"
        found[module] = [name for name, _ in rows]
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_documented(module):
    listed, public = sections()[module], importlib.import_module(module).__all__
    assert sorted(listed) == sorted(set(listed)), f"docs/api.md lists a name of {module} twice"
    missing, gone = sorted(set(public) - set(listed)), sorted(set(listed) - set(public))
    assert not missing, f"docs/api.md, section {module}: add a line for {', '.join(missing)}"
    assert not gone, f"docs/api.md, section {module}: {', '.join(gone)} not in {module}.__all__"


def test_every_documented_name_exists():
    for module, names in sections().items():
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"docs/api.md: {module} has no {name}"


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in getattr(node, "body", ())
                      if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef)}
    return names


def test_the_walks_name_what_exists():
    text = (ROOT / "docs/architecture.md").read_text().partition("## A batch, from")[2]
    steps = WALK.findall(text)
    assert len(steps) > 25
    for file, name in steps:
        assert (ROOT / file).is_file(), f"docs/architecture.md: {file} does not exist"
        assert name in defined(ROOT / file), f"docs/architecture.md: {file} does not define {name}"
