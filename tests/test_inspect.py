"""Inspection: numbers against counts by hand on small networks; the command on the digits."""

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


def test_clipping_and_snr_of_a_weight_are_those_counted_by_hand():
    model = small()
    weight = nulsq.inspect.report(model, [images(2, 2, 6, 6)]).layers[0].weight
    w = model[0].weight.detach()
    wanted = by_hand(w, WEIGHT_STEP * (w / WEIGHT_STEP).round().clamp(-2, 1), -2 * WEIGHT_STEP, WEIGHT_STEP)
    assert 0 < weight.clipped < 1 and weight.clipped == wanted["clipped"]
    assert weight.snr == pytest.approx(wanted["snr"], rel=1e-6)  # float32 levels


def test_clipping_snr_and_steps_of_an_input_are_those_counted_by_hand():
    """Over two batches of different sizes; level by level, thresholds in the middle of the steps."""
    batches = [images(5, 2, 6, 6, seed=1), images(2, 2, 6, 6, seed=2)]
    side = nulsq.inspect.report(small(), batches).layers[0].activation
    x = torch.cat(batches)
    levels = [0, 0.3, 0.8, 1.7]
    y = torch.zeros_like(x)
    for threshold, level in zip([0.15, 0.55, 1.25], levels[1:], strict=True):
        y[x > threshold] = level
    wanted = by_hand(x, y, 0, 1.7)
    assert side.count == x.numel() and side.clipped == wanted["clipped"]
    assert side.snr == pytest.approx(wanted["snr"], rel=1e-6)
    torch.testing.assert_close(side.gaps, torch.tensor(INPUT_STEPS))
    shares = [float((y == torch.tensor(level)).double().mean()) for level in levels]
    assert side.entropy == pytest.approx(-sum(p * math.log2(p) for p in shares), rel=1e-12)
    assert side.used == 4


def test_a_layer_behind_others_is_measured_in_the_quantized_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    nulsq.quantize_(model, Policy(bits=3, activation=SideRule(quantizer="lsq"), rules={}))
    x = images(20, 6)
    nulsq.calibrate_(model, [x])
    found = nulsq.inspect.report(model, [x]).layers[1].activation
    first = model[0]
    hidden = F.linear(first.activation_quantizer(x), first.weight_quantizer(first.weight), first.bias).relu()
    assert found.signal == pytest.approx(float(hidden.detach().double().square().sum()), rel=1e-9)


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("name", nulsq.available())
def test_every_quantizer_is_measured_as_it_encodes(name, bits, channels):
    w = images(6, 40, seed=bits) * torch.linspace(0.1, 3, 6)[:, None]
    quantizer = nulsq.get_quantizer(name)(bits, "weight", channels=channels)
    quantizer.reset_(Statistics.of(w, per_channel=channels is not None))
    found = Fidelity(quantizer)
    found.add(w)
    y = quantizer(w).detach()
    assert torch.equal(found.occupancy, torch.bincount(quantizer.encode(w).flatten(), minlength=len(found.occupancy)))
    assert found.noise == pytest.approx(float((w.double() - y.double()).square().sum()), rel=1e-9)
    levels = quantizer.levels()
    assert (found.below, found.above) == (int((w < levels[..., :1]).sum()), int((w > levels[..., -1:]).sum()))
    assert 0 < found.entropy <= bits and found.used <= 2**bits
    # per channel the sample is in steps of its channel: the widest has no more of them than the narrowest
    wanted = (w / levels.diff(dim=-1).mean(-1, keepdim=True)).flatten()
    torch.testing.assert_close(found.sample, wanted if channels else w.flatten())


@pytest.mark.parametrize("bits", [1, 2])
def test_unsigned_inputs_of_few_bits(bits):
    quantizer = nulsq.get_quantizer("nulsq")(bits, "activation", signed=False)
    x = images(8, 10).relu()
    quantizer.reset_(Statistics.of(x))
    found = Fidelity(quantizer)
    found.add(x)
    assert found.levels.shape == (2**bits,) and found.below == 0


def test_a_range_that_follows_the_batch_is_read_after_it():
    quantizer = nulsq.get_quantizer("minmax")(8, "activation", signed=False, range="dynamic")
    quantizer.reset_(Statistics.of(torch.ones(2)))
    found = Fidelity(quantizer)
    found.add(torch.linspace(0, 5, 100))
    assert found.clipped == 0 and float(found.levels[-1]) == pytest.approx(5)


def test_the_sample_is_bounded_repeatable_and_in_proportion():
    def sampled():
        quantizer = nulsq.get_quantizer("lsq")(4, "activation", signed=True)
        quantizer.reset_(Statistics.of(images(10)))
        found = Fidelity(quantizer)
        for sign, count in ((1, SAMPLE), (-1, 3 * SAMPLE), (1, 2 * SAMPLE)):
            found.add(torch.full((count,), float(sign)))
        return found.sample

    sample = sampled()
    assert len(sample) == SAMPLE and torch.equal(sample, sampled())
    # half of the values are negative; drawn, so within 4 standard deviations
    assert abs(float((sample < 0).float().mean()) - 0.5) < 4 * 0.5 / SAMPLE**0.5


def test_values_that_are_not_finite_are_counted_and_named_and_spoil_nothing():
    model, good, bad = small(), images(4, 2, 6, 6), images(4, 2, 6, 6, seed=1)
    bad[0, 0, 0, :2] = torch.tensor([math.nan, math.inf])
    found = nulsq.inspect.report(model, [good, bad])
    assert found.layers[0].activation.snr == nulsq.inspect.report(model, [good]).layers[0].activation.snr
    assert "0: 2 values of its input are NaN or infinite" in nulsq.inspect.text(found)
    json.dumps(nulsq.inspect.content(found), allow_nan=False)


def test_a_constant_zero_has_no_ratio():
    found = Fidelity(small()[0].activation_quantizer)
    found.add(torch.zeros(2, 3))
    assert math.isnan(found.snr) and found.entropy == 0 and found.used == 1


# ---- cost


def test_cost_is_that_counted_by_hand():
    """Convolution: 3 x 2 x 2 outputs of 2 x 3 x 3 weights each, W2A2; linear layer: 12 x 5, W3A32."""
    found = nulsq.inspect.report(small(), [images(3, 2, 6, 6)]).cost
    assert found.image == (2, 6, 6)
    assert [layer.macs for layer in found.layers.values()] == [3 * 2 * 2 * 18, 60]
    assert (found.macs, found.other_macs) == (216 + 60, 0)
    assert found.bit_operations == 216 * 2 * 2 + 60 * 3 * 32
    assert found.float_bit_operations == 276 * 1024
    assert found.weight_bytes == 14 + 23  # 54 weights of 2 bits, 60 of 3: rounded up for each tensor
    assert found.parameter_bytes == 3 * 4  # the bias
    assert found.quantizer_bytes == (1 + 3 + 1) * 4  # step, three steps, step
    assert found.float_bytes == (54 + 3 + 60) * 4
    assert found.average_weight_bits == pytest.approx((54 * 2 + 60 * 3) / 114)
    assert found.average_activation_bits == pytest.approx((72 * 2 + 12 * 32) / 84)  # inputs: 2 x 6 x 6 and 12


def test_macs_of_grouped_depthwise_and_dilated_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 3, groups=8, dilation=2, padding=2),
                          nn.Conv2d(8, 6, 1, stride=3, bias=False))
    found = cost_of(model, images(1, 4, 9, 9))
    assert [layer.macs for layer in found.layers.values()] == [8 * 81 * 9, 8 * 81 * 9, 6 * 9 * 8]
    assert found.other_macs == 0


class Attention(nn.Module):
    """Two heads, as the model libraries write it."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def test_tokens_count_and_the_products_inside_attention_are_named_apart():
    model = nn.Sequential(Attention(16), nn.LayerNorm(16), nn.Linear(16, 4))
    nulsq.quantize_(model, Policy(bits=4, weight=SideRule(quantizer="lsq", per_channel=True), rules={}))
    x = images(3, 10, 16)
    nulsq.calibrate_(model, [x])
    found = nulsq.inspect.report(model, [x])
    assert [layer.cost.macs for layer in found.layers] == [10 * 16 * 48, 10 * 16 * 16, 10 * 16 * 4]
    assert found.cost.other_macs == 2 * 10 * 10 * 16  # q k^T, and its product with v
    assert found.cost.bit_operations == 10 * 16 * (48 + 16 + 4) * 16 + 2 * 10 * 10 * 16 * 1024
    assert found.layers[0].roles == ["first", "qkv"]
    assert found.layers[0].activation.quantizer.signed and found.layers[0].activation.count == x.numel()
    assert found.layers[0].weight.levels.shape == (48, 16)


def test_products_of_layers_that_are_never_called_are_counted_all_the_same():
    """torch's attention uses the weights of its output layer without calling it, in a fused kernel where it may."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = cost_of(model, images(1, 5, 8))
    assert found.layers["self_attn.out_proj"].macs == 0
    assert found.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16


# ---- report


def test_a_report_leaves_the_model_as_it_was():
    model = small().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nulsq.inspect.report(model, [images(2, 2, 6, 6)])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_report_needs_a_batch():
    with pytest.raises(ValueError, match="no batch"):
        nulsq.inspect.report(small(), [])


def test_a_normalized_weight_is_measured_as_its_quantizer_sees_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4))
    nulsq.quantize_(model, Policy(bits=4, weight=SideRule(quantizer="apot"), activation=SideRule(quantizer="fp"),
                                  rules={}))
    nulsq.calibrate_(model, [])
    found = nulsq.inspect.report(model, [images(2, 30)])
    w = model[0].weight.detach().double()
    assert found.layers[0].weight.signal == pytest.approx(float(((w - w.mean()) / w.std()).square().sum()), rel=1e-5)
    assert found.layers[0].activation is None and "apot signed lwn" in nulsq.inspect.text(found)


def test_oscillating_and_frozen_weights_are_shares_of_the_layer():
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
    """More than a thousand red pixels, the levels, and more than half of the picture white."""
    from matplotlib import pyplot
    pixels = torch.from_numpy(pyplot.imread(path)).flatten(0, 1)[:, :3]
    red = pixels[:, 0] - pixels[:, 1:].amax(1) > 0.3
    return int(red.sum()) > 1000 and float((pixels > 0.99).all(1).float().mean()) > 0.5


def test_one_page_where_everything_fits(tmp_path):
    pytest.importorskip("matplotlib")
    made = nulsq.inspect.plot(nulsq.inspect.report(small(), [images(2, 2, 6, 6)]), tmp_path / "new", "small")
    assert made == [tmp_path / "new" / "overview.png"]
    assert min(png_size(made[0])) > 600 and is_drawn(made[0])
    assert list((tmp_path / "new").iterdir()) == made


def test_per_channel_tokens_and_many_levels_have_pictures(tmp_path):
    """Ten layers: an overview and two pages. Channels of very different widths, one layer all zero."""
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
    made = nulsq.inspect.plot(nulsq.inspect.report(model, [x]), tmp_path)
    assert [path.name for path in made] == ["overview.png", "layers-01.png", "layers-02.png"]
    assert all(is_drawn(path) for path in made)


# ---- the command


@pytest.fixture(scope="module")
def run(short, float_run):
    """A quantized run of one epoch that tracks oscillations, of weights of at most 4 bits, and averages its weights."""
    from nulsq.train import train
    recipe = short("inspected", model__init_from=str(float_run), optim__epochs=1, oscillation__track=True,
                   optim__ema_decay=0.5)
    train(recipe, quiet=True)
    return path_of(recipe)


def test_a_run_as_table_json_and_pictures(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(run), "--batches", "1", "--json", str(tmp_path / "new" / "report.json")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert found.keys() == {"title", "images", "layers", "totals"}
    assert len(found["layers"]) == 22 and all(layer["name"] in shown for layer in found["layers"])
    for layer in found["layers"]:
        edge = {"first", "last"} & set(layer["roles"])
        kinds = [(layer[side]["quantizer"], layer[side]["bits"]) for side in ("weight", "activation")]
        assert kinds == ([("minmax", 8)] * 2 if edge else [("lsq", 2), ("nulsq", 2)])
        assert layer["oscillating"] is None if edge else 0 <= layer["oscillating"] <= 1
        for side in (layer["weight"], layer["activation"]):
            assert len(side["levels"]) == len(side["steps"]) + 1 == len(side["thresholds"]) + 1
            assert sum(side["occupancy"]) == side["values"] and 0 <= side["clipped"] <= 1
            assert min(side["steps"]) == side["smallest_step"] <= side["largest_step"] == max(side["steps"])
    first = found["layers"][0]
    assert first["roles"] == ["first"] and first["weight"]["values"] == 432
    average = checkpoint.load_chosen(run)["ema"]["features.init_block.weight"]  # what evaluation sees
    assert first["weight"]["signal"] == pytest.approx(float(average.double().square().sum()), rel=1e-9)
    # preresnet20: 40.8 million multiply-accumulates and 0.27 million parameters, as published
    assert found["totals"]["macs"] == 40_813_184 and found["totals"]["float_bytes"] == 4 * 272_282
    assert found["totals"]["image"] == [3, 32, 32] and "3 x 32 x 32" in shown
    pictures = sorted(path.name for path in (run / "inspect").iterdir())
    assert pictures == ["layers-01.png", "layers-02.png", "layers-03.png", "overview.png"]
    assert all(str(run / "inspect" / name) in shown for name in pictures)
    assert all(min(png_size(run / "inspect" / name)) > 900 and is_drawn(run / "inspect" / name) for name in pictures)


def test_a_run_is_measured_on_its_holdout_and_test_stays_closed(run, tmp_path, capsys):
    """The run's data set with test images that cannot be read."""
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


def test_a_recipe_is_shown_as_it_would_start(short, float_run, tmp_path, capsys):
    """Overrides count; the same steps as a run that is calibrated and trained for no step has."""
    recipe = short("not-run", model__init_from=str(float_run), quant__weight__per_channel=True)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe))
    assert main([str(file), "quant.bits=3", "quant.rules.edges.enabled=false", "--no-plot", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["title"].startswith("not-run, before training")
    first = found["layers"][0]
    assert first["weight"]["channels"] == 16 and torch.tensor(first["weight"]["levels"]).shape == (16, 8)
    assert found["totals"]["average_weight_bits"] == 3 == found["totals"]["average_activation_bits"]
    weight = checkpoint.load_chosen(float_run)["model"]["features.init_block.weight"]
    assert first["weight"]["signal"] == pytest.approx(float(weight.double().square().sum()), rel=1e-9)
    assert not path_of(recipe).exists()


def test_a_float_run_has_totals_and_no_pictures(float_run, tmp_path, capsys):
    assert main([str(float_run), "--out", str(tmp_path / "out"), "--batches", "1"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is quantized" in shown and "weights 32.00, activations 32.00" in shown and "1.0 times" in shown
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
def test_what_cannot_be_inspected_is_one_line_and_exit_code_2(run, tmp_path, capsys, arguments, message):
    places = {"RUNS": run.parent, "RUN": run}
    for name in ("DAMAGED", "OTHER", "NODATA"):
        places[name] = tmp_path / name
        shutil.copytree(run, tmp_path / name)
    for file in (tmp_path / "DAMAGED/checkpoints").glob("*.pt"):
        file.write_bytes(b"PK damaged")
    recipe = (run / "recipe.yaml").read_text()
    (tmp_path / "OTHER/recipe.yaml").write_text(recipe.replace("preresnet20_cifar10", "preresnet56_cifar10"))
    (tmp_path / "NODATA/recipe.yaml").write_text(recipe.replace("/digits", "/elsewhere"))

    def settled(text):
        for name, place in sorted(places.items(), reverse=True):
            text = text.replace(name, str(place))
        return text

    assert main([settled(each) for each in arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert settled(message) in errors


def test_the_library_part_needs_torch_alone():
    code = ("import sys, torch, nulsq, nulsq.inspect\n"
            "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
            "x = torch.randn(8, 4)\n"
            "nulsq.calibrate_(nulsq.quantize_(model), [x])\n"
            "assert 'minmax' in nulsq.inspect.text(nulsq.inspect.report(model, [x]))\n"
            "print(sorted({'omegaconf', 'yaml', 'matplotlib', 'timm', 'torchvision', 'pytorchcv'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"
