"""The wheel: what `pip install` gives, in an environment without the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

USE = """
import nulsq, torch
from nulsq.quant.op import available
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
images = torch.randn(4, 3, 8, 8)
nulsq.calibrate_(nulsq.quantize_(model, nulsq.Policy(bits=2, rules={})), [images])
model(images).sum().backward()
print(nulsq.__file__, available("cpu"), len(model[2].weight_quantizer.levels()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: building leaves files behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "nulsq", source / "nulsq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(out), str(source)], check=True, capture_output=True, text=True)
    return next(out.glob("nulsq-*.whl"))


def test_the_wheel_holds_the_library_alone_and_all_of_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nulsq").rglob("*")
               if path.is_file() and path.suffix in {".py", ".cpp", ".h", ".typed"}}
    assert sources <= names
    assert {name.partition("/")[0] for name in names - sources} == {next(
        name.partition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))}
    assert any(name.endswith("LICENSE") for name in names)


def test_an_installed_wheel_quantizes_a_network(wheel, tmp_path):
    """In a new environment that has torch and nothing else of this one: no editable install, no checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
                    str(wheel)], check=True, capture_output=True, text=True)
    purelib = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    # A path that comes from a .pth file is searched, but .pth files in it are not read: the editable nulsq is not seen.
    (purelib / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run([str(python), "-c", USE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, compiled, levels = done.stdout.split()
    assert Path(file).is_relative_to(purelib) and levels == "4"
    assert compiled == str(shutil.which("c++") is not None)
