"""Rules of the repository: allowed imports, file sizes, YAML files that load, documented commands that parse."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nulsq.config import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nulsq", "tune", "launch", "data_prep", "bench")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of everything imported anywhere in a file, `require("...")` and `import_module("...")` included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "require", "import_module") and node.args and isinstance(node.args[0], ast.Constant):
            names.add(node.args[0].value)
    return names


def inside(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a dotted name or a path is one of these packages or below one; nulsq.quantizers is not in nulsq.quant."""
    return any(name == package or name.startswith((f"{package}.", f"{package}/")) for package in packages)


# Which files may import which packages. docs/architecture.md explains the rules.
ONLY_IN = {
    "ray": ("tune/ray_backend",),
    "ray.job_submission": ("launch", "tune/ray_backend"),
    "ffcv": ("nulsq/data/beton.py", "data_prep"),
    "omegaconf": ("nulsq/config",),
    "torchvision": ("nulsq/models", "nulsq/data/folder.py", "data_prep", "bench/coverage.py"),
    "timm": ("nulsq/models", "bench/coverage.py"),
    "pytorchcv": ("nulsq/models",),
    "onnx": ("nulsq/export", "bench"),
    "onnxruntime": ("nulsq/export", "bench"),
    "onnxscript": ("nulsq/export", "bench"),
    "triton": ("nulsq/quant/op/gpu", "bench"),
}
NEVER_IN = {
    "nulsq": ("tune", "launch", "data_prep", "bench"),
    "tune": ("launch", "data_prep", "bench"),
    "launch": ("tune", "data_prep", "bench"),
    "data_prep": ("tune", "launch", "bench"),
}
# Parts with few dependencies: quantization is a library of its own, and the engine runs without torch.
NEEDS_ONLY = {
    "nulsq/quant": ("torch", "triton", "nulsq.quant", "nulsq.quantizers", "nulsq.errors", "nulsq.text"),
    "nulsq/quantizers": ("torch", "nulsq.quant"),
    "nulsq/engine": ("numpy", "nulsq.engine", "nulsq.errors", "nulsq.files", "nulsq.text"),
    "nulsq/config": ("omegaconf", "yaml", "nulsq.config", "nulsq.errors", "nulsq.quant.settings",
                     "nulsq.quant.registry"),
    "nulsq/errors.py": (), "nulsq/files.py": (), "nulsq/text.py": (),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_rules(path):
    file = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        package = next((known for known in sorted(ONLY_IN, key=len, reverse=True) if inside(name, (known,))), None)
        assert package is None or inside(file, ONLY_IN[package]), f"{file} imports {name}"
        assert not inside(name, NEVER_IN.get(file.partition("/")[0], ())), f"{file} imports {name}"
        for part, allowed in NEEDS_ONLY.items():
            if inside(file, (part,)):
                assert name.partition(".")[0] in sys.stdlib_module_names or inside(name, allowed), \
                    f"{file} imports {name}"


def test_nulsq_imports_no_package_besides_torch():
    code = ("import sys, nulsq, torch\n"
            "nulsq.calibrate_(nulsq.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))), "
            "[torch.randn(8, 4)])\n"
            "print(sorted({'omegaconf', 'yaml', 'ray', 'ffcv', 'timm', 'torchvision', 'pytorchcv', 'numba'} "
            "& set(sys.modules)))")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["nulsq", "nulsq.config.command_line", "nulsq.run.directory", "tune.search",
                                    "tune.status", "tune.ray_backend.trial", "launch.__main__"])
def test_modules_that_do_not_train_do_not_import_torch(module):
    """Importing torch is slow, and the process of a search would keep its memory as long as the trials run."""
    code = f"import sys, importlib; importlib.import_module({module!r}); print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.strip() == "False"


def test_type_checking_imports_equal_the_lazily_loaded_names():
    import nulsq
    tree = ast.parse((ROOT / "nulsq/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported | {"__version__": "nulsq._version"} == {
        name: nulsq._MODULES.get(name, "nulsq._version") for name in nulsq.__all__}
    for name, module in imported.items():
        assert getattr(nulsq, name) is getattr(importlib.import_module(module), name)
    assert set(nulsq.__all__) <= set(dir(nulsq))
    with pytest.raises(AttributeError, match="no attribute 'quantise_'"):
        nulsq.quantise_  # noqa: B018


def test_every_initializer_name_has_a_function():
    from nulsq.quant import settings
    from nulsq.quant.calibration import initial_step as init
    assert ("mse", *init.BY_NAME) == settings.INITIALIZERS  # `mse` is a search, no formula


@pytest.mark.parametrize(("missing", "code", "extra"), [
    ("omegaconf", "from nulsq.config import *; load(Recipe)", "train"),
    ("timm", "from nulsq.models.libraries import *; build_model('timm:resnet18', 10)", "train"),
    ("pytorchcv", "from nulsq.models.libraries import *; build_model('pytorchcv:preresnet20_cifar10', 10)", "train"),
    ("ffcv", "from nulsq.data import *; from nulsq.config import Data; from types import SimpleNamespace as N; "
             "import numpy; check_data(Data(loader='ffcv', batch=1), N(kind='arrays', "
             "labels=lambda split: numpy.arange(20) % 2))", "ffcv"),
    ("matplotlib", "from nulsq.inspect import plot; plot(None, 'x')", "train"),
    ("ray", "from tune.search import run; from tune.space import Search; run(Search(name='x'), None, None, None)",
     "search"),
])
def test_error_for_a_missing_package_names_the_extra_to_install(missing, code, extra):
    """Hide one package from a new interpreter and run code that needs it."""
    program = ("import sys, importlib.abc\n"
               "class Hide(importlib.abc.MetaPathFinder):\n"
               "    def find_spec(self, name, path=None, target=None):\n"
               f"        if name.partition('.')[0] == {missing!r}: raise ModuleNotFoundError(name=name)\n"
               "sys.meta_path.insert(0, Hide())\n"
               "import importlib.util; real = importlib.util.find_spec\n"
               f"importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else real(name, *rest)\n"
               f"try:\n    exec({code!r})\nexcept Exception as error: print(type(error).__name__, error)\n")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert f"InputError this needs {missing}" in process.stdout, process.stdout + process.stderr[-500:]
    assert f"pip install 'nulsq[{extra}]'" in process.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_have_docstrings_and_specific_names(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))
    assert path.stem not in {"utils", "util", "helpers", "manager", "engine", "trainer", "common", "misc"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_header_has_its_command(path):
    load_recipe(path)
    assert re.search(r"^# run: +python -m nulsq\.train " + re.escape(str(path.relative_to(ROOT))), path.read_text(),
                     re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/search").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_search_loads_and_its_header_has_its_command(path, monkeypatch):
    from tune.space import load_search
    monkeypatch.chdir(ROOT)
    load_search(path)
    assert f"# run:      python -m tune.search {path.relative_to(ROOT)}" in path.read_text()


# ---- the README and the docs


DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines():
    for path in DOCS:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition("  #")[0].strip()
                if line and not line.startswith("#"):
                    yield pytest.param(line, id=f"{path.name}: {line[:60]}")


@pytest.mark.parametrize("line", shell_lines())
def test_documented_commands_parse(line, monkeypatch):
    """Every command in the docs names an existing module or make target, with arguments that it accepts."""
    from nulsq.config import command_line
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    while words and "=" in words[0]:
        words = words[1:]  # environment
    if words[0] == "make":
        assert len(words) == 2 and re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] in ("git", "cd", "pip", "tensorboard", "export", "source", "sh"):
        return
    assert words[0] in ("python", "torchrun"), line
    if "-m" not in words:
        assert words[1].startswith("$NULSQ_DATA") or (ROOT / words[1]).is_file(), line
        return
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2:]
    if module == "nulsq.train":
        command_line.parse(command_line.parser("x", ""), arguments)
    elif module in ("tune.search", "tune.array"):
        from tune.space import load_search
        parsed = importlib.import_module(module).parser().parse_intermixed_args(arguments)
        load_search(parsed.search, parsed.overrides)
    elif module == "launch":
        from launch import __main__ as launch
        from launch.site import load_site
        if arguments[0] == "local":
            assert launch.main([*arguments[:3], "--print", *arguments[3:]]) == 0
            return
        parsed, rest = launch.parser().parse_known_args(arguments)
        assert not [word for word in rest if word.startswith("-")]
        if "site" in parsed:
            load_site(parsed.site, parsed.at, getattr(parsed, "sbatch", []))
    elif module == "data_prep":
        from data_prep.__main__ import parser
        parser().parse_args(arguments)
    elif module in ("nulsq.evaluate", "nulsq.inspect", "tune.status", "tune.report") or module.startswith("bench."):
        suffix = ".__main__" if module in ("nulsq.inspect", "tune.report") else ""
        importlib.import_module(module + suffix).parser().parse_intermixed_args(arguments)
    else:
        assert module == "pytest", line


def test_python_code_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        process = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd="/", timeout=300)
        assert process.returncode == 0, process.stderr


def test_tree_in_the_docs_lists_exactly_the_source_files():
    """docs/architecture.md has one line with a description for every source file, and lists no other file."""
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"## The tree\n\n```text\n(.*?)```", text, re.DOTALL).group(1)
    listed, folders = set(), {}
    for line in block.splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        level = len(indent) // 2
        path = f"{folders[level - 1]}{name}" if level else name
        if name.endswith("/"):
            folders[level] = path
        else:
            listed.add(path)
        assert description, f"docs/architecture.md: {path} has no description"
    suffixes = {".py", ".cpp", ".h", ".sh", ".css", ".js", ".html"}
    existing = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*")
                if path.suffix in suffixes and path.name != "__init__.py"}
    assert listed == existing


def test_every_test_named_in_the_docs_exists():
    named = {name for page in ("reliability", "search", "launch")
             for name in re.findall(r"`(test_\w+)`", (ROOT / f"docs/{page}.md").read_text())}
    existing = {name for path in (ROOT / "tests").glob("test_*.py")
                for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    assert len(named) > 20 and named <= existing, named - existing


def test_committed_files_name_no_local_path_or_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".cfg", ".toml", ".txt", ".sh", ""} and path.is_file():
            text = path.read_text()
            for word in ("py" + "pi.org", "/wo" + "rk/", "regis" + "try.npm"):
                assert word not in text, f"{name} names {word}"
