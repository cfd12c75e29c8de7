"""Shared fixtures: one prepared digits data set, one float network with trained batch norms, and short recipes."""

import os

# One thread makes sums come out in the same order in every process. Tests of equality mean equal bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray runs its workers at niceness 15: another test on the same core would take nearly all of its time.
os.environ.setdefault("RAY_worker_niceness", "0")

import importlib.util
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HAS_FFCV = importlib.util.find_spec("ffcv") is not None

needs_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed")


def pytest_configure(config):
    torch.set_num_threads(1)


# Files whose tests need only torch and the model libraries: `make proofs` also runs them with the oldest torch.
QUANT = {"test_any_layer", "test_attention", "test_dequantize", "test_fold", "test_goldens", "test_goldens_network",
         "test_methods", "test_methods_network", "test_op", "test_op_fused", "test_op_incoming_gradient", "test_policy",
         "test_quantize", "test_quantizer_contract", "test_quantizer_state", "test_tracing"}


# The files that take longest start first, so that no process is left alone with one of them at the end.
LONGEST = ["test_search_ray", "test_cuda_graph", "test_models", "test_train", "test_op_affine", "test_launch"]
PROOFS = ("slow", "slurm")
# Seconds since 1970 after which no further proof starts: .ci/run has to end within the hour.
LAST_START = float(os.environ.get("NULSQ_LAST_START", "inf"))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in QUANT:
            item.add_marker(pytest.mark.quant)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if time.time() > LAST_START and any(map(item.get_closest_marker, PROOFS)):
        pytest.skip("no time left for it: make proofs")


@pytest.fixture(autouse=True)
def one_thread():
    """What a test has set, or a command that it has called, is not the next one's: two threads round differently."""
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--quantizer", default=None, help="run the contract tests on a quantizer module of your own")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The embedded data set, prepared."""
    pytest.importorskip("sklearn")
    from data_prep.digits import prepare
    return prepare(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def short(digits, tmp_path_factory):
    """short(name, **dotted overrides): a recipe of a few steps on the digits, in a run directory of its own."""
    from nulsq.config import Recipe, load
    root = tmp_path_factory.mktemp("runs")

    def make(name: str, **overrides):
        settings = {
            "name": name, "run.root": str(root), "run.threads": 1, "run.device": "cpu", "data.path": str(digits),
            "data.batch": 32, "data.subset": 128, "data.holdout": "stratified:0.05", "data.crop": "pad",
            "data.padding": 2, "data.loader": "torchvision", "optim.epochs": 2, "optim.lr": 0.05,
            "quant.calibration_batches": 2,
        }
        return load(Recipe, None, settings | {key.replace("__", "."): value for key, value in overrides.items()})
    return make


@pytest.fixture
def steps_done(monkeypatch) -> list[int]:
    """What `TrainState.step` was set to in this process, in order: the last entry is the step that a run is at."""
    from nulsq.training.state import TrainState
    done, plain = [0], TrainState.__setattr__

    def note(state, name, value):
        plain(state, name, value)
        if name == "step":
            done.append(value)

    monkeypatch.setattr(TrainState, "__setattr__", note)
    return done


FLOAT = {"quant__weight__quantizer": "fp", "quant__activation__quantizer": "fp", "quant__rules__edges__enabled": False}


@pytest.fixture(scope="session")
def float_run(short) -> Path:
    """Run directory of a float network trained for two short epochs."""
    from nulsq.run.directory import path_of
    from nulsq.train import train
    recipe = short("float", **FLOAT)
    assert train(recipe, quiet=True).status == "finished"
    return path_of(recipe)


@pytest.fixture(scope="session")
def uninterrupted(short, float_run) -> Path:
    """Run directory of an uninterrupted quantized run of three epochs, four steps each."""
    from nulsq.run.directory import path_of
    from nulsq.train import train
    recipe = short("uninterrupted", model__init_from=str(float_run), optim__epochs=3)
    assert train(recipe, quiet=True).status == "finished"
    return path_of(recipe)


@pytest.fixture(scope="session")
def search_file(short, tmp_path_factory) -> Path:
    """Trials that start from a network that has learned something, and a last draw that harms it (lr 3e-4, 6e-4,
    0.087): from chance trials tie, and ASHA stops none that ties with those before it, or betters them."""
    folder = tmp_path_factory.mktemp("search")
    from nulsq.config import to_yaml
    from nulsq.run.directory import path_of
    from nulsq.train import train
    learned = short("learned", **FLOAT, optim__epochs=6, data__subset=1024)
    assert train(learned, quiet=True).status == "finished"
    recipe = short("trial", model__init_from=str(path_of(learned)), optim__epochs=4)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "tiny.yaml").write_text(f"""
recipe: {folder}/recipe.yaml
dir: {folder}/out
studies:
  activation: {{key: quant.activation.quantizer, values: [nulsq, lsq]}}
  bits: {{key: quant.bits, values: [2, 4]}}
space:
  lr: {{key: optim.lr, sample: loguniform, low: 1e-4, high: 0.1}}
trials: 3
repeats: 1
seed: 39
reduction: 2
""")
    return folder / "tiny.yaml"


@pytest.fixture
def slow(tmp_path, monkeypatch) -> Path:
    """While this file is there, the quantizer `tests.slowed` sleeps: a run can be met in the middle."""
    path = tmp_path / "slow"
    path.touch()
    monkeypatch.setenv("NULSQ_TEST_SLOW", str(path))
    return path


@pytest.fixture(scope="module")
def two_nodes():
    """A real Slurm of two nodes on this machine."""
    from tests.slurm_cluster import cluster
    with cluster() as made:
        yield made


@pytest.fixture
def in_the_checkout(monkeypatch) -> None:
    """Paths in the project's own configurations start from its root."""
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
