"""The benchmark tools: timing, counts and rows are correct."""

import json

import pytest
import torch
from torch import nn

from bench import bandwidth, kernels, quantizers, step
from bench.counts import compilations, graph_breaks, operations, peak_bytes, synchronizations
from bench.timing import interleaved, ratios, row, table, timed_row, write_json
from nulsq.quant.op.cpu import kernel as cpu
from nulsq.training.step import WARM_UP


def test_interleaved_alternates_sides_and_ratios_are_per_round():
    """Every round is twice as slow as the previous one, which does not change the ratios."""
    now, speed, order = [0.0], [1.0], []

    def side(name, cost):
        def run():
            order.append(name)
            now[0] += cost * speed[0]
            speed[0] *= 2 if name == "b" else 1
        return run

    times = interleaved({"a": side("a", 2.0), "b": side("b", 3.0)}, rounds=5, warm_up=1, clock=lambda: now[0])
    assert order == ["a", "b"] * 6
    assert ratios(times["b"], times["a"]) == (1.5, 1.5, 1.5)
    assert ratios([1.0, 2.0, 6.0], [1.0, 1.0, 2.0]) == (2.0, 1.5, 2.5)


def test_rows_report_whether_the_target_is_met_and_are_written_as_json(tmp_path):
    rows = [row("LSQ", 2, "syncs", 0.0, 0.0), row("LSQ", 3, "x", 1.2, 1.1), row("LSQ", None, "x", 1.0, None),
            timed_row("LCQ", 4, "eager", [3.0, 3.0], [2.0, 2.0], 1.6)]
    assert [line["met"] for line in rows] == [True, False, None, True]
    write_json(tmp_path / "rows.json", rows)
    read = json.loads((tmp_path / "rows.json").read_text())
    assert read == rows and set(read[0]) == {"name", "bits", "setting", "ratio", "target", "met"}
    assert "| LCQ | 4 | eager | 1.500 | 1.50 - 1.50 | 1.6 | yes | 3000.0 / 2000.0 |" in table(rows)
    write_json(None, rows)


@pytest.mark.parametrize(("case", "expected"), [
    (("compiled", "nulsq-a", 2), 1.05), (("compiled", "lsq", 4), 1.10), (("compiled", "lcq", 4), 1.30),
    (("compiled", "apot", 3), 1.15), (("eager", "nulsq-wa", 2), 1.18), (("eager", "nulsq-a", 2), 1.15),
    (("eager", "nulsq-a", 4), 1.18), (("bf16", "nulsq-a", 3), 1.08), (("bf16", "nulsq-a", 4), 1.12),
    (("eager", "uniq", 2), 1.25),
    (("eager", "lcq", 2), 1.6), (("bf16", "lsq", 2), 1.05), (("memory-eager", "lsq", 2), 1.25),
    (("preresnet18", "nulsq-a", 2), 1.05), (("no-compiler", "lsq", 2), None)])
def test_target_of_each_case(case, expected):
    assert step.target(*case) == expected


def test_synchronizations_are_counted():
    x = torch.ones(10)
    assert synchronizations(lambda: x + 1) == 0
    assert synchronizations(lambda: float(x.sum()) and x.nonzero()) == 2


def test_peak_bytes_counts_allocations_of_the_call():
    def run():
        a = torch.empty(1000, 1000)
        b = torch.empty(1000, 1000)
        del a
        c = torch.empty(500, 1000)
        return float(b[0, 0] + c[0, 0])

    assert peak_bytes(run) == pytest.approx(8_000_000, abs=10_000)


def test_operations_are_sorted_by_decreasing_time():
    x = torch.randn(300, 300)
    times = operations(lambda: (x @ x).relu())
    assert {"aten::mm", "aten::relu"} <= set(times)
    assert list(times.values()) == sorted(times.values(), reverse=True)


class Broken(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x + 1


def test_graph_breaks_and_compilations_are_counted():
    x = torch.ones(2, 3)
    assert graph_breaks(nn.Linear(3, 3), x) == 0
    assert graph_breaks(Broken(), x) == 1
    assert compilations(nn.ReLU()) == 2  # one for the first shape, one for any shape


def test_quantizers_of_nulsq_and_of_other_libraries_run():
    x, dy = quantizers.activation((2, 4, 4, 4))
    for method in quantizers.METHODS:
        quantizers.both_passes(quantizers.quantizer(method, 2, x), x, dy)()
    assert quantizers.quantizer("apot", 8, x) is None
    available, missing = quantizers.others(x, 2)
    for operation in available.values():
        y = operation(x)
        assert len(y.unique()) <= 4
    assert len(available) >= 2 and set(missing) <= {"torchao", "brevitas"}


def test_step_changes_the_parameters_and_counts_the_images():
    training_step = step.Step([*step.quantized("nulsq-a", 2), "model.name=pytorchcv:resnet20_cifar10"], "eager")
    before = [p.clone() for p in training_step.model.parameters()]
    training_step()
    assert all(p.isfinite().all() for p in training_step.model.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(before, training_step.model.parameters(), strict=True)]
    assert sum(changed) > len(before) // 2
    assert training_step.state.counters.values[3] == 128


def test_bandwidth_shares_have_no_targets_on_a_cpu():
    rows = bandwidth.measure("nulsq", 2, torch.float32, torch.device("cpu"), 10_000, 2)
    assert [line["setting"] for line in rows] == [f"cpu float32 {side}" for side in bandwidth.PASSES]
    assert all(line["ratio"] > 0 and line["met"] is None for line in rows)


def test_loader_benchmark_has_a_row_for_each_kind_and_rejects_no_workers(digits, capsys):
    from data_prep.__main__ import main
    assert main(["bench", str(digits), "--workers", "1", "--seconds", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split("|")[1].strip() for line in lines[2:]]
    assert kinds == (["ffcv"] if (digits / "train.beton").is_file() else []) + ["torchvision", "device"]
    assert all(float(line.split("|")[3]) > 100 for line in lines[2:])
    assert main(["bench", str(digits), "--workers", "0"]) == 2


@pytest.mark.long
@pytest.mark.ffcv
def test_loader_benchmark_compares_every_storage_format_with_pillow(tmp_path):
    import numpy as np
    from PIL import Image

    from bench import loader
    pytest.importorskip("ffcv")
    draw = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.fromarray(draw.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i}.jpg")
    assert loader.main([str(tmp_path / "photos"), "--images", "80", "--rounds", "2", "--workers", "1", "--no-training",
                        "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [line["name"] for line in rows] == [*loader.FORMATS, loader.BASE] and rows[-1]["ratio"] == 1.0
    assert all(line["cold"] > 0 and line["megabytes"] > 0 and line["images_per_second"] > 0 for line in rows)


@pytest.mark.skipif(not (kernels.ROOT / ".git").exists(), reason="no git checkout")
@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler on this machine")
@pytest.mark.slow
def test_kernel_benchmark_times_the_kernel_of_another_commit(tmp_path, capsys):
    assert kernels.main(["HEAD", "--methods", "nulsq", "--bits", "4", "--rounds", "2", "--json",
                         str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(line["setting"], line["rounds"]) for line in rows] == [("forward", 2), ("backward", 2)]
    assert kernels.library_of("HEAD", tmp_path)._name.startswith(str(tmp_path))
    assert kernels.main(["no-such-commit"]) == 2
    assert "COMMIT no-such-commit" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["eager", "cuda-graph", "compiled", "compiled-cuda-graph", "memory-eager"])
def test_training_step_on_a_gpu(setting):
    """The step does not synchronize, and a step that is replayed as a CUDA graph changes the parameters."""
    device = torch.device("cuda")
    rows = step.measure(setting, [("nulsq-a", 2)], 3, device)
    assert len(rows) == 1 and rows[0]["ratio"] > 0
    assert step.measure("syncs", [("nulsq-a", 2)], 1, device)[0]["ratio"] == 0
    if setting == "cuda-graph":
        training_step = step.Step(step.quantized("nulsq-a", 2), setting, device)
        for _ in range(WARM_UP + 1):  # the last one records and replays
            training_step()
        before = [parameter.clone() for parameter in training_step.model.parameters()]
        training_step()
        after = training_step.model.parameters()
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.numel() > 1)
