"""docs/add-a-quantizer.md, run: the quantizer in it passes the contract's tests, trains and exports its levels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nulsq.run.directory import path_of, read_metrics
from nulsq.train import train

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/add-a-quantizer.md").read_text()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A folder with the page's my_lab/powers.py in it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    code, = re.findall(r"```python\n(# my_lab/powers.py\n.*?)```", PAGE, re.DOTALL)
    (folder / "my_lab").mkdir()
    (folder / "my_lab/powers.py").write_text(code)
    return folder


def run(lab, *command):
    path = os.pathsep.join([str(lab), str(ROOT)])
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": path})


def test_the_pages_quantizer_keeps_the_contract(lab):
    command, = re.findall(r"```bash\npython (-m pytest .*?)\n```", PAGE, re.DOTALL)
    done = run(lab, *command.split(), "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed > 100 and "failed" not in done.stdout


def test_the_pages_quantizer_exports_its_levels(lab):
    code, = re.findall(r"```python\n(import nulsq, torch\n.*?)```", PAGE, re.DOTALL)
    done = run(lab, "-c", code)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr


def test_the_pages_quantizer_trains(lab, short, float_run, monkeypatch):
    monkeypatch.syspath_prepend(str(lab))
    recipe = short("powers", model__init_from=str(float_run), quant__bits=3, optim__epochs=1,
                   quant__weight__quantizer="my_lab.powers", quant__activation__quantizer="my_lab.powers",
                   quant__activation__init="lsq")
    assert train(recipe, quiet=True).status == "finished"
    assert read_metrics(path_of(recipe))[0]["train_loss"] < 10
