"""The GPU form: equal to the oracle in Triton's interpreter or on a GPU, and compiled for sm_90 without one."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from nulsq.quant.op import force, gpu, oracle
from nulsq.quant.op.oracle import Table
from tests import test_op_fused

ready = functools.partial(test_op_fused.ready, rows=1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
kernel = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU, and not interpreted")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICE = "cpu" if INTERPRETED else "cuda"


def test_in_tritons_interpreter():
    """The tests marked `kernel` once more, in a process that interprets Triton: it has to be decided at its import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "kernel", __file__], capture_output=True,
                          text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40


def assert_equal_to_oracle(quantizer, x, dy):
    table = Table(*(None if t is None else t.detach() for t in quantizer.table()))
    rule = quantizer.rule()
    wanted, found = oracle.quantize(x, table, rule)[0].to(x.dtype), gpu.quantize(x, table, rule)
    assert found.dtype == x.dtype and found.stride() == x.stride()
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter cuts what a GPU rounds to nearest
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, wanted)
    wanted, found = oracle.gradients(x, dy, table, rule), gpu.gradients(x, dy, table, rule)
    assert torch.equal(found[0], wanted[0]) and found[0].stride() == x.stride()
    for a, b in zip(found[1:], wanted[1:], strict=True):
        if b is None:
            assert not a.numel()
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def tensors(*shape, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).to(DEVICE, dtype) for _ in range(2)]


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["lsq", "nulsq", "apot", "lcq", "uniq"])
def test_kernel_of_every_method_width_and_type(name, bits, dtype):
    quantizer = ready(name, bits).to(DEVICE)
    assert_equal_to_oracle(quantizer.double() if dtype == torch.float64 else quantizer, *tensors(5, 7, 11, dtype=dtype))


@kernel
@pytest.mark.parametrize("bits", [1, 8])
def test_kernel_of_the_narrowest_and_the_widest(bits):
    for name in ("minmax", "nulsq"):
        signed = bits > 1
        assert_equal_to_oracle(ready(name, bits, signed=signed).to(DEVICE), *tensors(5, 7))


@kernel
@pytest.mark.parametrize("ste", ["clip", "clip_open", "half", "none"])
def test_kernel_at_thresholds_and_ends(ste):
    for name in ("lsq", "nulsq"):
        quantizer = ready(name, 2, signed=True, ste=ste)
        marks = torch.cat([quantizer.levels(), quantizer.thresholds()])
        x = torch.cat([marks, torch.nextafter(marks, marks + 1), torch.nextafter(marks, marks - 1),
                       torch.tensor([0.0, -0.0, torch.inf, -torch.inf])]).to(DEVICE)
        assert_equal_to_oracle(quantizer.to(DEVICE), x, torch.ones_like(x))
        table, rule = quantizer.table(), quantizer.rule()
        assert gpu.quantize(torch.tensor([torch.nan], device=DEVICE), table, rule).isnan().all()


@kernel
@pytest.mark.parametrize("name", ["lsq", "nulsq", "lcq"])
def test_kernel_with_a_table_for_each_channel(name):
    quantizer = ready(name, 3, "weight", channels=6).to(DEVICE)
    x, dy = tensors(6, 5, 3, 3)
    assert_equal_to_oracle(quantizer, x, dy)
    assert_equal_to_oracle(quantizer, *(t.contiguous(memory_format=torch.channels_last) for t in (x, dy)))


@kernel
@pytest.mark.parametrize(("x_type", "table_type"), [(torch.bfloat16, torch.float64), (torch.float32, torch.float64),
                                                    (torch.float64, torch.float32)])
def test_kernel_with_a_table_of_another_type(x_type, table_type):
    for name in ("lsq", "nulsq", "lcq"):
        assert_equal_to_oracle(ready(name, 3).to(DEVICE, table_type), *tensors(5, 7, 11, dtype=x_type))


@kernel
@pytest.mark.parametrize("name", ["lsq", "nulsq", "lcq"])
def test_kernel_with_the_relu_before_it(name):
    for signed in (False, True):
        quantizer = ready(name, 3, signed=signed).to(DEVICE)
        quantizer.relu = True
        x, dy = tensors(5, 7, 11)
        x[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-30, -torch.inf])
        assert_equal_to_oracle(quantizer, x, dy)


@kernel
def test_kernel_over_several_blocks_of_a_program_and_empty_tensors():
    assert_equal_to_oracle(ready("nulsq", 2).to(DEVICE), *tensors(23, 1000))
    assert_equal_to_oracle(ready("nulsq", 2).to(DEVICE), *tensors(0, 4))


# ---- without a GPU: what the compiler makes of it


def resources(name: str, bits: int, which: str, kind: str) -> tuple[int, int]:
    """Registers and bytes of local memory of a kernel compiled for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    rule, kernels = ready(name, bits, signed=False).rule(), gpu._kernels()
    function, static = getattr(kernels, which), gpu._static(rule) | {"KIND": kernels.tl.float32}
    tensors = ["x_from", "y_to"] if which == "quantize" else ["x_from", "dy_from", "dx_to"]
    signature = dict.fromkeys(tensors, f"*{kind}")
    if which == "quantize":
        static["BLOCK"] = gpu.FORWARD_BLOCK
    else:
        slots, rows = gpu.slots_and_rows(rule)
        signature["partial"] = "*fp32"
        static |= {"STE": rule.ste, "REDUCTION": rule.reduction, "SEGMENTS": rule.segments, "SLOTS": slots,
                   "BLOCK": gpu._block(rows, 4 if kind == "fp32" else 2)}
    signature |= dict.fromkeys(("gaps", "levels", "thresholds"), "*fp32") | {"elements": "i64"}
    place = function.arg_names.index
    source = ASTSource(function, signature | dict.fromkeys(static, "constexpr"),
                       {(place(key),): value for key, value in static.items()},
                       {(place(key),): [["tt.divisibility", 16]] for key in (*tensors, "elements")})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": gpu.WARPS, "enable_fp_fusion": False})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton brings no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said.stdout)
    return int(found[1]), int(found[2]) + int(found[3])


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "bits"), [("lsq", 4), ("nulsq", 2), ("nulsq", 3), ("nulsq", 4), ("lcq", 4)])
def test_compiled_for_sm_90_nothing_spills(name, bits, kind):
    for which in ("quantize", "gradients"):
        registers, local = resources(name, bits, which, kind)
        assert registers <= 160 and local <= 16, (which, registers, local)


# ---- on a GPU


class TestOnAGPU:
    pytestmark = on_gpu

    def test_the_usual_choice_is_the_kernel(self):
        quantizer, (x, _) = ready("nulsq", 2).to("cuda"), tensors(100)
        assert type(quantizer(x.requires_grad_()).grad_fn).__name__ == "FusedBackward"

    def test_no_synchronization_and_the_same_bits_every_time(self):
        quantizer, (x, dy), found = ready("nulsq", 3).to("cuda"), tensors(64, 1000), []
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                quantizer.zero_grad()
                quantizer(x).backward(dy)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append(quantizer.steps.grad.clone())
        assert torch.equal(*found)

    def test_forward_and_backward_in_a_cuda_graph(self):
        quantizer, (x, dy) = ready("nulsq", 2).to("cuda"), tensors(64, 100)
        x.requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            quantizer(x).backward(dy)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        quantizer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.cuda.graph(graph):
            quantizer(x).backward(dy)
        with torch.no_grad():
            x.mul_(2)
        graph.replay()
        found = [x.grad.clone(), quantizer.steps.grad.clone()]
        quantizer.zero_grad()
        x.grad = None
        with force("oracle"):
            quantizer(x).backward(dy)
        torch.testing.assert_close(found, [x.grad, quantizer.steps.grad], rtol=1e-5, atol=1e-5)
