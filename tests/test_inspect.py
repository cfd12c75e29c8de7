"""Inspection: small networks against hand-computed values, and the command on the digits."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nulsq
import nulsq.inspect
from nulsq import LayerRule, Policy, SideRule
from nulsq.config import to_yaml
from nulsq.cost import cost_of
from nulsq.inspect.__main__ import main
from nulsq.inspect.fidelity import SAMPLE, Fidelity
from nulsq.quant.calibration.statistics import Statistics
from nulsq.quant.oscillation import Oscillations
from nulsq.quant.settings import OscillationSettings
from nulsq.run import checkpoint
from nulsq.run.directory import path_of

WEIGHT_STEP, INPUT_STEPS = 0.1, [0.3, 0.5, 0.9]


def images(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def small():
    """A convolution of 2-bit LSQ weights and 2-bit nuLSQ inputs, a linear layer of 3-bit weights and float inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5, bias=False))
    nulsq.quantize_(model, Policy(bits=2, activation=SideRule(quantizer="nulsq", signed=False), rules={
        "last": LayerRule(["role:last"], bits=3, activation=SideRule(quantizer="fp"))}))
    nulsq.calibrate_(model, [images(4, 2, 6, 6).abs()])
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight_quantizer.step.fill_(WEIGHT_STEP)
        model[0].activation_quantizer.steps.copy_(torch.tensor(INPUT_STEPS))
    return model


def by_hand(x, quantized, low, high):
    """Clipped share and SNR in dB, in float64."""
    x, quantized = x.detach().double(), quantized.double()
    ratio = x.square().sum() / (x - quantized).square().sum()
    return {"clipped": float(((x < low) | (x > high)).double().mean()), "snr": 10 * math.log10(ratio)}


# ---- one quantizer and its values


def test_clipping_and_snr_of_a_weight_equal_hand_computed_values():
    model = small()
    weight = nulsq.inspect.report(model, [images(2, 2, 6, 6)]).layers[0].weight
    w = model[0].weight.detach()
    expected = by_hand(w, WEIGHT_STEP * (w / WEIGHT_STEP).round().clamp(-2, 1), -2 * WEIGHT_STEP, WEIGHT_STEP)
    assert 0 < weight.clipped < 1 and weight.clipped == expected["clipped"]
    assert weight.snr == pytest.approx(expected["snr"], rel=1e-6)  # the levels are float32


def test_clipping_snr_and_steps_of_an_input_equal_hand_computed_values():
    """Two batches of different sizes; each threshold is the midpoint of its step."""
    batches = [images(5, 2, 6, 6, seed=1), images(2, 2, 6, 6, seed=2)]
    side = nulsq.inspect.report(small(), batches).layers[0].activation
    x = torch.cat(batches)
    levels = [0, 0.3, 0.8, 1.7]
    y = torch.zeros_like(x)
    for threshold, level in zip([0.15, 0.55, 1.25], levels[1:], strict=True):
        y[x > threshold] = level
    expected = by_hand(x, y, 0, 1.7)
    assert side.count == x.numel() and side.clipped == expected["clipped"]
    assert side.snr == pytest.approx(expected["snr"], rel=1e-6)
    torch.testing.assert_close(side.gaps, torch.tensor(INPUT_STEPS))
    shares = [float((y == torch.tensor(level)).double().mean()) for level in levels]
    assert side.entropy == pytest.approx(-sum(p * math.log2(p) for p in shares), rel=1e-12)
    assert side.used == 4


def test_later_layer_is_measured_on_the_output_of_quantized_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nulsq.quantize_(model, Policy(bits=3, activation=SideRule(quantizer="lsq"), rules={}))
    x = images(20, 6)
    nulsq.calibrate_(model, [x])
    actual = nulsq.inspect.report(model, [x]).layers[1].activation
    first = model[0]
    hidden = F.linear(first.activation_quantizer(x), first.weight_quantizer(first.weight), first.bias).relu()
    assert actual.signal == pytest.approx(float(hidden.detach().double().square().sum()), rel=1e-9)


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("name", nulsq.available())
def test_fidelity_of_every_quantizer_agrees_with_its_encoding(name, bits, channels):
    w = images(6, 40, seed=bits) * torch.linspace(0.1, 3, 6)[:, None]
    quantizer = nulsq.get_quantizer(name)(bits, "weight", channels=channels)
    quantizer.reset_(Statistics.of(w, per_channel=channels is not None))
    fidelity = Fidelity(quantizer)
    fidelity.add(w)
    y = quantizer(w).detach()
    counts = torch.bincount(quantizer.encode(w).flatten(), minlength=len(fidelity.occupancy))
    assert torch.equal(fidelity.occupancy, counts)
    assert fidelity.noise == pytest.approx(float((w.double() - y.double()).square().sum()), rel=1e-9)
    levels = quantizer.levels()
    assert (fidelity.below, fidelity.above) == (int((w < levels[..., :1]).sum()), int((w > levels[..., -1:]).sum()))
    assert 0 < fidelity.entropy <= bits and fidelity.used <= 2**bits
    # per channel, sampled values are in units of the channel's mean step, so all channels have the same weight
    expected = (w / levels.diff(dim=-1).mean(-1, keepdim=True)).flatten()
    torch.testing.assert_close(fidelity.sample, expected if channels else w.flatten())


@pytest.mark.parametrize("bits", [1, 2])
def test_fidelity_of_unsigned_inputs_with_few_bits(bits):
    quantizer = nulsq.get_quantizer("nulsq")(bits, "activation", signed=False)
    x = images(8, 10).relu()
    quantizer.reset_(Statistics.of(x))
    fidelity = Fidelity(quantizer)
    fidelity.add(x)
    assert fidelity.levels.shape == (2**bits,) and fidelity.below == 0


def test_dynamic_range_is_read_after_the_batch():
    quantizer = nulsq.get_quantizer("minmax")(8, "activation", signed=False, range="dynamic")
    quantizer.reset_(Statistics.of(torch.ones(2)))
    fidelity = Fidelity(quantizer)
    fidelity.add(torch.linspace(0, 5, 100))
    assert fidelity.clipped == 0 and float(fidelity.levels[-1]) == pytest.approx(5)


def test_sample_is_bounded_reproducible_and_proportional():
    def draw_sample():
        quantizer = nulsq.get_quantizer("lsq")(4, "activation", signed=True)
        quantizer.reset_(Statistics.of(images(10)))
        fidelity = Fidelity(quantizer)
        for sign, count in ((1, SAMPLE), (-1, 3 * SAMPLE), (1, 2 * SAMPLE)):
            fidelity.add(torch.full((count,), float(sign)))
        return fidelity.sample

    sample = draw_sample()
    assert len(sample) == SAMPLE and torch.equal(sample, draw_sample())
    # half of the values are negative; tolerance of 4 standard deviations for a random sample
    assert abs(float((sample < 0).float().mean()) - 0.5) < 4 * 0.5 / SAMPLE**0.5


def test_nonfinite_values_are_counted_and_excluded_from_the_measures():
    model, good, bad = small(), images(4, 2, 6, 6), images(4, 2, 6, 6, seed=1)
    bad[0, 0, 0, :2] = torch.tensor([math.nan, math.inf])
    report = nulsq.inspect.report(model, [good, bad])
    assert report.layers[0].activation.snr == nulsq.inspect.report(model, [good]).layers[0].activation.snr
    assert "0: 2 values of its input are NaN or infinite" in nulsq.inspect.text(report)
    json.dumps(nulsq.inspect.content(report), allow_nan=False)


def test_snr_of_a_constant_zero_is_nan():
    fidelity = Fidelity(small()[0].activation_quantizer)
    fidelity.add(torch.zeros(2, 3))
    assert math.isnan(fidelity.snr) and fidelity.entropy == 0 and fidelity.used == 1


# ---- cost


def test_cost_equals_hand_computed_values():
    """Convolution: 3 x 2 x 2 outputs of 2 x 3 x 3 weights each, W2A2; linear layer: 12 x 5, W3A32."""
    cost = nulsq.inspect.report(small(), [images(3, 2, 6, 6)]).cost
    assert cost.image == (2, 6, 6)
    assert [layer.macs for layer in cost.layers.values()] == [3 * 2 * 2 * 18, 60]
    assert (cost.macs, cost.other_macs) == (216 + 60, 0)
    assert cost.bit_operations == 216 * 2 * 2 + 60 * 3 * 32
    assert cost.float_bit_operations == 276 * 1024
    assert cost.weight_bytes == 14 + 23  # 54 weights of 2 bits, 60 of 3: rounded up for each tensor
    assert cost.parameter_bytes == 3 * 4  # the bias
    assert cost.quantizer_bytes == (1 + 3 + 1) * 4  # step, three steps, step
    assert cost.float_bytes == (54 + 3 + 60) * 4
    assert cost.average_weight_bits == pytest.approx((54 * 2 + 60 * 3) / 114)
    assert cost.average_activation_bits == pytest.approx((72 * 2 + 12 * 32) / 84)  # inputs: 2 x 6 x 6 and 12


def test_macs_of_grouped_depthwise_and_dilated_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 3, groups=8, dilation=2, padding=2),
                          nn.Conv2d(8, 6, 1, stride=3, bias=False))
    cost = cost_of(model, images(1, 4, 9, 9))
    assert [layer.macs for layer in cost.layers.values()] == [8 * 81 * 9, 8 * 81 * 9, 6 * 9 * 8]
    assert cost.other_macs == 0


class Attention(nn.Module):
    """Attention with two heads, written as in the model libraries."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def test_macs_count_tokens_and_list_attention_products_separately():
    model = nn.Sequential(Attention(16), nn.LayerNorm(16), nn.Linear(16, 4))
    nulsq.quantize_(model, Policy(bits=4, weight=SideRule(quantizer="lsq", per_channel=True), rules={}))
    x = images(3, 10, 16)
    nulsq.calibrate_(model, [x])
    report = nulsq.inspect.report(model, [x])
    assert [layer.cost.macs for layer in report.layers] == [10 * 16 * 48, 10 * 16 * 16, 10 * 16 * 4]
    assert report.cost.other_macs == 2 * 10 * 10 * 16  # q k^T, and its product with v
    assert report.cost.bit_operations == 10 * 16 * (48 + 16 + 4) * 16 + 2 * 10 * 10 * 16 * 1024
    assert report.layers[0].roles == ["first", "qkv"]
    assert report.layers[0].activation.quantizer.signed and report.layers[0].activation.count == x.numel()
    assert report.layers[0].weight.levels.shape == (48, 16)


def test_macs_of_layers_that_are_not_called_are_counted():
    """torch's attention projects its inputs and its output by weights that are no layer's, or without calling one."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    cost = cost_of(model, images(1, 5, 8))
    assert cost.layers["self_attn"].macs == 3 * 5 * 8 * 8 and cost.layers["self_attn.out_proj"].macs == 5 * 8 * 8
    assert cost.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16


# ---- report


def test_report_does_not_change_the_model():
    model = small().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nulsq.inspect.report(model, [images(2, 2, 6, 6)])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_report_without_a_batch_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        nulsq.inspect.report(small(), [])


def test_normalized_weight_is_measured_after_normalization():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4))
    nulsq.quantize_(model, Policy(bits=4, weight=SideRule(quantizer="apot"), activation=SideRule(quantizer="fp"),
                                  rules={}))
    nulsq.calibrate_(model, [])
    report = nulsq.inspect.report(model, [images(2, 30)])
    w = model[0].weight.detach().double()
    assert report.layers[0].weight.signal == pytest.approx(float(((w - w.mean()) / w.std()).square().sum()), rel=1e-5)
    assert report.layers[0].activation is None and "apot signed lwn" in nulsq.inspect.text(report)


def test_oscillating_and_frozen_weights_are_reported_as_shares_of_the_layer():
    model = small()
    Oscillations(model, OscillationSettings(track=True, max_bits=2))
    tracker = model[0].oscillation
    tracker.frequency.view(-1)[:27] = 0.01
    tracker.frozen.view(-1)[:9] = True
    first, last = nulsq.inspect.report(model, [images(2, 2, 6, 6)]).layers
    assert (first.oscillating, first.frozen) == (27 / 54, 9 / 54)
    assert (last.oscillating, last.frozen) == (None, None)
    first, _ = nulsq.inspect.report(model, [images(2, 2, 6, 6)], oscillating_above=0.02).layers
    assert first.oscillating == 0


# ---- pictures


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def is_drawn(path: Path) -> bool:
    """Whether more than a thousand pixels are red, as levels are, and more than half of the picture is white."""
    from matplotlib import pyplot
    pixels = torch.from_numpy(pyplot.imread(path)).flatten(0, 1)[:, :3]
    red = pixels[:, 0] - pixels[:, 1:].amax(1) > 0.3
    return int(red.sum()) > 1000 and float((pixels > 0.99).all(1).float().mean()) > 0.5


def test_plot_of_a_small_network_is_one_page(tmp_path):
    pytest.importorskip("matplotlib")
    files = nulsq.inspect.plot(nulsq.inspect.report(small(), [images(2, 2, 6, 6)]), tmp_path / "new", "small")
    assert files == [tmp_path / "new" / "overview.png"]
    assert min(png_size(files[0])) > 600 and is_drawn(files[0])
    assert list((tmp_path / "new").iterdir()) == files


def test_plots_of_per_channel_steps_tokens_and_many_levels(tmp_path):
    """Ten layers give an overview and two pages; channel ranges differ widely, and one layer is all zero."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(10)))
    with torch.no_grad():
        model[2].weight *= torch.logspace(-3, 1, 12)[:, None]
        model[4].weight.zero_(), model[4].bias.zero_()
    nulsq.quantize_(model, Policy(bits=3, weight=SideRule(quantizer="nulsq", per_channel=True),
                                  activation=SideRule(quantizer="uniq"), rules={
                                      "one": LayerRule(["3"], weight=SideRule(quantizer="uniq", bits=1)),
                                      "eight": LayerRule(["6"], quantizer="minmax", bits=8)}))
    x = images(2, 5, 12)
    nulsq.calibrate_(model, [x])
    files = nulsq.inspect.plot(nulsq.inspect.report(model, [x]), tmp_path)
    assert [path.name for path in files] == ["overview.png", "layers-01.png", "layers-02.png"]
    assert all(is_drawn(path) for path in files)


# ---- the command


@pytest.fixture(scope="module")
def run(short, float_run):
    """A quantized run of one epoch that tracks oscillations and averages its weights."""
    from nulsq.train import train
    recipe = short("inspected", model__init_from=str(float_run), optim__epochs=1, oscillation__track=True,
                   optim__ema_decay=0.5)
    train(recipe, quiet=True)
    return path_of(recipe)


def test_inspect_command_writes_table_json_and_pictures_of_a_run(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(run), "--batches", "1", "--json", str(tmp_path / "new" / "report.json")]) == 0
    output = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report.keys() == {"title", "images", "layers", "totals"}
    assert len(report["layers"]) == 22 and all(layer["name"] in output for layer in report["layers"])
    for layer in report["layers"]:
        edge = {"first", "last"} & set(layer["roles"])
        quantizers = [(layer[side]["quantizer"], layer[side]["bits"]) for side in ("weight", "activation")]
        assert quantizers == ([("minmax", 8)] * 2 if edge else [("lsq", 2), ("nulsq", 2)])
        assert layer["oscillating"] is None if edge else 0 <= layer["oscillating"] <= 1
        for side in (layer["weight"], layer["activation"]):
            assert len(side["levels"]) == len(side["steps"]) + 1 == len(side["thresholds"]) + 1
            assert sum(side["occupancy"]) == side["values"] and 0 <= side["clipped"] <= 1
            assert min(side["steps"]) == side["smallest_step"] <= side["largest_step"] == max(side["steps"])
    first = report["layers"][0]
    assert first["roles"] == ["first"] and first["weight"]["values"] == 432
    average = checkpoint.load_chosen(run)["ema"]["features.init_block.weight"]  # evaluation uses the average
    assert first["weight"]["signal"] == pytest.approx(float(average.double().square().sum()), rel=1e-9)
    # preresnet20: 40.8 million multiply-accumulates and 0.27 million parameters, as published
    assert report["totals"]["macs"] == 40_813_184 and report["totals"]["float_bytes"] == 4 * 272_282
    assert report["totals"]["image"] == [3, 32, 32] and "3 x 32 x 32" in output
    pictures = sorted(path.name for path in (run / "inspect").iterdir())
    assert pictures == ["layers-01.png", "layers-02.png", "layers-03.png", "overview.png"]
    assert all(str(run / "inspect" / name) in output for name in pictures)
    assert all(min(png_size(run / "inspect" / name)) > 900 and is_drawn(run / "inspect" / name) for name in pictures)


def test_inspect_command_measures_the_holdout_and_never_reads_test_images(run, tmp_path, capsys):
    """The data set is a copy whose test images cannot be read."""
    from nulsq.run.directory import read_recipe
    copy, data = tmp_path / "run", tmp_path / "digits"
    recipe = read_recipe(run)
    shutil.copytree(recipe.data.path, data)
    for file in data.glob("test_images*"):
        file.write_bytes(b"?" * file.stat().st_size)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("inspect"))
    (copy / "recipe.yaml").write_text(to_yaml(recipe).replace(str(recipe.data.path), str(data)))
    assert main([str(copy), "--no-plot", "--batches", "1", "--json", "-"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert "32 images of the holdout" in ours["title"]
    assert main([str(run), "--no-plot", "--batches", "1", "--json", "-"]) == 0
    theirs = json.loads(capsys.readouterr().out)
    assert ours["layers"] == theirs["layers"] and ours["totals"] == theirs["totals"]
    assert not (copy / "inspect").exists()


def test_inspect_command_shows_a_recipe_before_training(short, float_run, tmp_path, capsys):
    """Overrides apply, and the network is the calibrated one that training would start from."""
    recipe = short("not-run", model__init_from=str(float_run), quant__weight__per_channel=True)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert main([str(file), "quant.bits=3", "quant.rules.edges.enabled=false", "--no-plot", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["title"].startswith("not-run, before training")
    first = report["layers"][0]
    assert first["weight"]["channels"] == 16 and torch.tensor(first["weight"]["levels"]).shape == (16, 8)
    assert report["totals"]["average_weight_bits"] == 3 == report["totals"]["average_activation_bits"]
    weight = checkpoint.load_chosen(float_run)["model"]["features.init_block.weight"]
    assert first["weight"]["signal"] == pytest.approx(float(weight.double().square().sum()), rel=1e-9)
    assert not path_of(recipe).exists()


def test_inspect_command_prints_totals_and_no_pictures_for_a_float_run(float_run, tmp_path, capsys):
    assert main([str(float_run), "--out", str(tmp_path / "out"), "--batches", "1"]) == 0
    output = capsys.readouterr().out
    assert "nothing is quantized" in output and "weights 32.00, activations 32.00" in output and "1.0 times" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["RUNS/inspectde"], "Did you mean 'RUNS/inspected-0'"),
    (["RUNS"], "is not a run directory (no recipe.yaml); in it there are: "),
    (["RUN/metrics.jsonl"], "is neither a run directory nor a recipe"),
    (["nowhere/at/all"], "no run directory or recipe nowhere/at/all"),
    (["nowhere.yaml"], "no file nowhere.yaml"),
    (["RUN", "quant.bits=3"], "quant.bits=3: a run is shown as it was trained"),
    (["RUN", "--batches", "0"], "--batches 0, allowed: at least 1"),
    (["RUN", "--jsn", "x"], "Did you mean '--json'?"),
    (["RUN", "--no-plot", "--json", "RUN"], "cannot be written"),
    (["DAMAGED"], "can be read: "),
    (["DAMAGED", "--checkpoint", "best"], "is damaged: its 10 bytes are not the"),
    (["OTHER"], "the checkpoint is not of this network"),
    (["NODATA"], "is not a prepared data set"),
    (["RUN/recipe.yaml", "quant.bitz=3"], "quant.bitz"),
    (["RUN/recipe.yaml", "--checkpoint", "best"], "--checkpoint best: only a run has checkpoints"),
])
def test_inspect_command_returns_exit_code_2_for_invalid_input(run, tmp_path, capsys, arguments, message):
    paths = {"RUNS": run.parent, "RUN": run}
    for name in ("DAMAGED", "OTHER", "NODATA"):
        paths[name] = tmp_path / name
        shutil.copytree(run, tmp_path / name)
    for file in (tmp_path / "DAMAGED/checkpoints").glob("*.pt"):
        file.write_bytes(b"PK damaged")
    recipe = (run / "recipe.yaml").read_text()
    (tmp_path / "OTHER/recipe.yaml").write_text(recipe.replace("preresnet20_cifar10", "preresnet56_cifar10"))
    (tmp_path / "NODATA/recipe.yaml").write_text(recipe.replace("/digits", "/elsewhere"))

    def with_paths(text):
        for name, path in sorted(paths.items(), reverse=True):
            text = text.replace(name, str(path))
        return text

    assert main([with_paths(argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert with_paths(message) in errors


def test_nulsq_inspect_imports_no_package_besides_torch():
    code = ("import sys, torch, nulsq, nulsq.inspect\n"
            "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
            "x = torch.randn(8, 4)\n"
            "nulsq.calibrate_(nulsq.quantize_(model), [x])\n"
            "assert 'minmax' in nulsq.inspect.text(nulsq.inspect.report(model, [x]))\n"
            "print(sorted({'omegaconf', 'yaml', 'matplotlib', 'timm', 'torchvision', 'pytorchcv'} & set(sys.modules)))")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert process.stdout.strip() == "[]"
