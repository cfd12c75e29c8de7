"""Compiled steps: cached between processes, eager if nothing can compile, and equal to training with the reference."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import nulsq
import nulsq.training.compile
from nulsq.models.network import build_network
from nulsq.quant.batch_norm import freeze_batch_norm_
from nulsq.quant.fold import fold_
from nulsq.quant.op import available, force
from nulsq.training.loss import TaskLoss, backward
from nulsq.training.metrics import Counters
from nulsq.training.optim import Optimizers
from tests.test_fold import DEVICES

SMALL = """
import sys, warnings, torch, nulsq
from torch import nn
from torch._dynamo.utils import counters
from nulsq.training.compile import compiled
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
x = torch.randn(4, 3, 12, 12)
nulsq.calibrate_(nulsq.quantize_(net), [x])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    quick = compiled(net, torch.device("cpu"))
quick(x).sum().backward()
messages = [str(warning.message) for warning in caught if "torch.compile" in str(warning.message)]
misses, hits = counters["inductor"]["fxgraph_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"]
print(quick is net, misses, hits, messages)
"""


def small(tmp_path, **environment):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True,
                             env=os.environ | cache | environment)
    return process.stdout.strip()


def test_network_stays_eager_with_one_warning_if_no_compiler_works(tmp_path):
    output = small(tmp_path, CXX="/nonexistent/c++")
    assert output.startswith("True ") and output.count("run.compile") == 1  # the network itself, one warning
    assert "torch.compile does not work here" in output and "InvalidCxxCompiler" in output


@pytest.mark.slow
@pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")
def test_second_process_loads_compiled_graphs_from_the_cache(tmp_path):
    first, second = small(tmp_path), small(tmp_path)
    assert first == "False 3 0 []"  # a test compilation, forward and backward
    assert second == "False 0 2 []"


FAULTS = """
import resource, sys, torch
from nulsq.training.memory import keep_freed_memory
kept = len(sys.argv) > 1 and keep_freed_memory()
for _ in range(3): blocks = [torch.ones(2**21) for _ in range(8)]; del blocks
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): blocks = [torch.ones(2**21) for _ in range(8)]; del blocks
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_is_reused_without_page_faults():
    """Five rounds of 64 MiB are 80,000 pages."""
    kept, faults = subprocess.run([sys.executable, "-c", FAULTS, "keep"], capture_output=True, text=True,
                                  check=True).stdout.split()
    if kept == "False":
        pytest.skip("no glibc malloc on this machine")
    assert int(faults) < 1000


# ---- training with the fused form equals training with the reference


def losses(recipe, images, labels, form, *, kind=torch.float32, compiled=False, steps=10):
    """Losses of the first steps, with the parts of the trainer."""
    torch.manual_seed(0)
    with force(form):
        model = build_network(recipe, 10, start=False)
        nulsq.calibrate_(model, [images[0]])
        fold_(model)
        model.to(kind).train()
        network = nulsq.training.compile.compiled(model, torch.device("cpu")) if compiled else model
        optimizers, counters, actual = Optimizers(model, recipe.optim), Counters(torch.device("cpu")), []
        for x, y in zip(images[:steps], labels, strict=False):
            before = counters.values.clone()
            optimizers.zero_grad()
            backward(network, x.to(kind), y, TaskLoss.of(recipe), counters)
            optimizers.step(0.01)
            actual.append((counters.values - before).tolist())
    return torch.tensor(actual)


@pytest.fixture(scope="module")
def batches(digits):
    from nulsq.data import DataSet, Normalize
    data = DataSet(digits)
    pixels = torch.from_numpy(data.images("train")[:160].copy()).permute(0, 3, 1, 2)
    images = Normalize(data, torch.device("cpu"), channels_last=False)(pixels).split(16)
    return images, torch.from_numpy(data.labels("train")[:160]).split(16)


@pytest.mark.parametrize("method", ["nulsq", *(pytest.param(name, marks=pytest.mark.slow)
                                               for name in ("lsq", "lcq", "apot", "uniq"))])
def test_first_ten_losses_of_the_fused_form_equal_the_reference(short, batches, method):
    recipe = short("losses", quant__weight__quantizer=method, quant__activation__quantizer=method)
    expected, actual = (losses(recipe, *batches, form) for form in ("reference", "fused"))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_first_ten_losses_of_a_compiled_network_equal_the_reference_in_float64(short, batches):
    """In float32 a compiled batch norm rounds differently, which moves values near a threshold to another level."""
    recipe = short("losses")
    expected = losses(recipe, *batches, "reference", kind=torch.float64)
    actual = losses(recipe, *batches, "fused", kind=torch.float64, compiled=True)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


class Forked(nn.Module):
    """Two convolutions read one activation."""

    def __init__(self, activation):
        super().__init__()
        self.before, self.activation = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), activation
        self.one, self.two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.activation(self.before(x))
        return self.one(x) + self.two(x)


@pytest.mark.slow
@pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")
def test_compiled_quantizer_is_inlined_forward_and_calls_the_kernel_backward():
    """Two convolutions read one activation, each through its own quantizer; gradients equal those of eager mode."""
    from torch._inductor.utils import run_and_get_code

    from nulsq.training.compile import compiled

    torch.manual_seed(0)
    model, x = Forked(nn.Identity()).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    nulsq.calibrate_(nulsq.quantize_(model, nulsq.Policy(preset="none", bits=3)), [x])
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    quick = compiled(model, torch.device("cpu"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, code = run_and_get_code(lambda: quick(x).square().sum().backward())
    for a, b in zip([parameter.grad for parameter in model.parameters()], expected, strict=True):
        torch.testing.assert_close(a, b)
    assert "ops.nulsq.gradients.default(" in "".join(code) and "ops.nulsq.quantize" not in "".join(code)
    # Kept for backward are the inputs of the batch norm and of one convolution. Inputs of the quantizers and of the
    # other convolution are recomputed, without keeping any comparison.
    large = [tensor.dtype for tensor in kept if tensor.shape == (2, 4, 7, 7)]
    assert large == [torch.float64] * 2


@pytest.mark.slow
@pytest.mark.skipif(not available("cpu"), reason="no C++ compiler on this machine")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_folded_batch_norm_runs_inside_the_quantizer_kernels(frozen, device):
    """A batch norm that is not frozen also calls the moments kernel. Gradients and running statistics equal those of
    eager mode; one of the inputs of the two convolutions is recomputed."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    model, x = (value.to(device, torch.float64) for value in (Forked(nn.ReLU()), torch.randn(2, 3, 9, 9)))
    nulsq.calibrate_(nulsq.quantize_(model, nulsq.Policy(preset="none", bits=3)), [x])
    assert fold_(model) == ["activation", "before.1"]
    if frozen:
        freeze_batch_norm_(model)
    plain = copy.deepcopy(model)
    quick, kept = nulsq.training.compile.compiled(model, torch.device(device)), []
    plain(x).square().sum().backward()
    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, code = run_and_get_code(lambda: quick(x).square().sum().backward())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    code = "".join(code)
    # The quantizer of the images, which follows no batch norm, is compiled to comparisons in the forward pass.
    assert code.count("ops.nulsq.quantize.default(") == 3 and code.count("ops.nulsq.gradients.default(") == 1
    assert code.count("ops.nulsq.gradients_after_norm.default(") == 2
    assert code.count("ops.nulsq.moments.default(") == (0 if frozen else 1)
    assert [tensor.dtype for tensor in kept if tensor.shape == (2, 4, 7, 7)] == [torch.float64] * 2
