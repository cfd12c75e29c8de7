"""Policies: roles on every family of networks, presets, overrides by hand, and what contradicts itself."""

from pathlib import Path

import pytest
import torch
from torch import nn

import nulsq
from nulsq.config import load_recipe
from nulsq.config.command_line import parse, parser
from nulsq.errors import InputError
from nulsq.models.libraries import build_model
from nulsq.models.network import build_network, is_float
from nulsq.quant.policy import quantizable, roles
from nulsq.quant.settings import LayerRule, Policy, SideRule

ROOT = Path(__file__).resolve().parent.parent
W2A2 = ROOT / "configs/recipes/digits/w2a2.yaml"
FLOAT = ROOT / "configs/recipes/digits/float.yaml"


def small():
    """A stem, a block with a shortcut, a depthwise convolution, a classifier."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=8), "downsample": nn.Conv2d(8, 8, 1)})
    return nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "block": block, "head": nn.Linear(8, 5)})


def settings(model):
    """(weight, activation) of each quantized layer as "name bits"."""
    def one(quantizer):
        return "float" if quantizer is None else f"{quantizer.name()} {quantizer.bits}"
    return {name: (one(layer.weight_quantizer), one(layer.activation_quantizer))
            for name, layer in model.named_modules() if hasattr(layer, "weight_quantizer")}


def from_command_line(*arguments, recipe=W2A2):
    """The quantized network of a command line, on torchvision's resnet18."""
    _, read = parse(parser("x", ""), [str(recipe), "model.name=torchvision:resnet18", "model.init_from=null",
                                      *arguments])
    return build_network(read, 10)


# ---- roles


@pytest.mark.parametrize(("name", "classes", "first", "last", "counts"), [
    # counts: depthwise, downsample, qkv
    ("pytorchcv:preresnet20_cifar10", 10, "features.init_block", "output", (0, 2, 0)),
    ("pytorchcv:preresnet18", 10, "features.init_block.conv", "output", (0, 3, 0)),
    ("pytorchcv:resnet18", 10, "features.init_block.conv.conv", "output", (0, 3, 0)),
    ("pytorchcv:mobilenetv2_w1", 10, "features.init_block.conv", "output", (17, 0, 0)),
    ("torchvision:resnet18", 10, "conv1", "fc", (0, 3, 0)),
    ("torchvision:resnet50", 10, "conv1", "fc", (0, 4, 0)),
    ("timm:resnet18", 10, "conv1", "fc", (0, 3, 0)),
    ("timm:mobilenetv2_100", 10, "conv_stem", "classifier", (17, 0, 0)),
    ("timm:efficientnet_lite0", 10, "conv_stem", "classifier", (16, 0, 0)),
    ("timm:deit_tiny_patch16_224", 10, "patch_embed.proj", "head", (0, 0, 12)),
    ("timm:swin_tiny_patch4_window7_224", 10, "patch_embed.proj", "head.fc", (0, 3, 12)),
    ("timm:convnext_tiny", 10, "stem.0", "head.fc", (18, 3, 0)),
])
def test_roles_of_each_family(name, classes, first, last, counts):
    pytest.importorskip(name.partition(":")[0])
    model = build_model(name, classes)
    found = roles(model)
    assert (found["first"], found["last"]) == ([first], [last])
    assert tuple(len(found[role]) for role in ("depthwise", "downsample", "qkv")) == counts
    assert roles(nulsq.quantize_(model)) == found  # the summary reads them from the quantized network


def test_shortcuts_are_the_ones_that_the_residual_takes():
    pytest.importorskip("pytorchcv")
    assert roles(build_model("pytorchcv:preresnet20_cifar10", 10))["downsample"] == [
        "features.stage2.unit1.identity_conv", "features.stage3.unit1.identity_conv"]
    assert roles(build_model("torchvision:resnet18", 10))["downsample"] == [
        "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"]
    assert roles(build_model("timm:swin_tiny_patch4_window7_224", 10))["downsample"] == [
        f"layers.{stage}.downsample.reduction" for stage in (1, 2, 3)]
    assert roles(build_model("timm:convnext_tiny", 10))["downsample"] == [
        f"stages.{stage}.downsample.1" for stage in (1, 2, 3)]


@pytest.mark.parametrize("names", [("qkv",), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("q", "kv"),
                                   ("query", "key", "value")])
def test_projections_of_an_attention_by_any_of_their_names(names):
    attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in (*names, "proj")})
    assert roles(nn.ModuleDict({"attn": attention}))["qkv"] == [f"attn.{name}" for name in names]


def test_a_convolution_of_one_channel_is_not_depthwise():
    found = roles(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=4)))
    assert found["depthwise"] == ["1"]


def test_rules_by_role():
    rules = {"dw": LayerRule(["role:depthwise"], bits=4), "short": LayerRule(["role:downsample"], quantizer="fp")}
    assert settings(nulsq.quantize_(small(), Policy(rules=Policy().rules | rules))) == {
        "stem": ("minmax 8", "minmax 8"), "block.conv": ("lsq 4", "nulsq 4"), "head": ("minmax 8", "minmax 8")}


def test_a_role_that_the_model_lacks_is_an_error_that_names_those_it_has():
    rule = {"heads": LayerRule(["role:qkv"], bits=4)}
    with pytest.raises(ValueError, match=r"quant.rules.heads.match: no layer .* has role:qkv; it has role:first, "
                                         r"role:last, role:depthwise, role:downsample. quant.rules.heads.enabled"):
        nulsq.quantize_(small(), Policy(rules=rule))


def test_a_role_that_the_model_lacks_is_passed_over_where_the_rule_matches_otherwise():
    """So that one rule serves a search over several networks."""
    rule = {"delicate": LayerRule(["role:qkv", "role:depthwise"], bits=4)}
    found = settings(nulsq.quantize_(small(), Policy(rules=rule)))
    assert found["block.conv"] == ("lsq 4", "nulsq 4") and found["stem"] == ("lsq 2", "nulsq 2")
    # A name is of one network: there a match of another entry excuses nothing.
    with pytest.raises(ValueError, match=r"'blok.\*' matches no layer. Did you mean .block"):
        nulsq.quantize_(small(), Policy(rules={"x": LayerRule(["role:first", "blok.*"])}))


def test_a_rule_without_layers_is_an_error():
    with pytest.raises(InputError, match="quant.rules.edge.match is empty.* Did you mean 'edges'"):
        from_command_line("quant.rules.edge.bits=4")


# ---- mixed precision by hand


def test_bits_of_some_layers_from_the_command_line():
    found = settings(from_command_line("quant.rules.mid.match=[layer1.*]", "quant.rules.mid.bits=3"))
    assert {found[name] for name in found if name.startswith("layer1.")} == {("lsq 3", "nulsq 3")}
    assert {found[name] for name in found if name.startswith("layer2.")} == {("lsq 2", "nulsq 2")}
    assert found["conv1"] == found["fc"] == ("minmax 8", "minmax 8")


def test_bits_of_weights_and_activations_apart():
    found = settings(from_command_line(
        "quant.rules.mid.match=[layer1.*,layer2.0.conv1]", "quant.rules.mid.weight.bits=4",
        "quant.rules.mid.activation.bits=3", "quant.activation.bits=5"))
    assert found["layer1.1.conv2"] == found["layer2.0.conv1"] == ("lsq 4", "nulsq 3")
    assert found["layer2.0.conv2"] == ("lsq 2", "nulsq 5")


# ---- presets


def test_preset_none_has_all_layers_at_the_same_bits():
    assert set(settings(from_command_line("quant.preset=none")).values()) == {("lsq 2", "nulsq 2")}


def test_preset_weights_only_leaves_every_activation_float():
    found = settings(from_command_line("quant.preset=weights_only"))
    assert found.pop("conv1") == found.pop("fc") == ("minmax 8", "float")
    assert set(found.values()) == {("lsq 2", "float")}


def test_preset_paper_is_the_default_and_its_rule_can_be_changed():
    assert settings(from_command_line("quant.preset=paper")) == settings(from_command_line())
    found = settings(from_command_line("quant.preset=paper", "quant.rules.edges.bits=4"))
    assert found["conv1"] == ("minmax 4", "minmax 4")


@pytest.mark.parametrize(("preset", "stem", "mid"), [
    ("none", ("lsq 2", "nulsq 2"), ("lsq 3", "nulsq 3")),
    ("weights_only", ("minmax 8", "float"), ("lsq 3", "float")),
])
def test_presets_go_with_rules_of_ones_own(preset, stem, mid):
    found = settings(from_command_line(f"quant.preset={preset}", "quant.rules.mid.match=[layer1.*]",
                                       "quant.rules.mid.bits=3"))
    assert (found["conv1"], found["layer1.0.conv1"]) == (stem, mid)


def test_a_rule_of_ones_own_for_the_edges_under_preset_none():
    found = settings(from_command_line("quant.preset=none", "quant.rules.ends.match=['role:first','role:last']",
                                       "quant.rules.ends.bits=6"))
    assert found["conv1"] == found["fc"] == ("lsq 6", "nulsq 6")


@pytest.mark.parametrize(("arguments", "message"), [
    (["quant.preset=non"], "quant.preset = 'non'. Did you mean 'none'"),
    (["quant.preset=weight_only"], "Did you mean 'weights_only'"),
    (["quant.preset=8bit"], "quant.preset = '8bit'. Allowed: paper, none, weights_only"),
    (["quant.preset=none", "quant.rules.edges.bits=4"], "quant.preset = none .* but quant.rules.edges was changed"),
    (["quant.preset=weights_only", "quant.rules.edges.activation.quantizer=lsq"],
     "weights_only leaves activations float, but quant.rules.edges.activation.quantizer = lsq"),
    (["quant.preset=weights_only", "quant.rules.mid.match=[layer1.*]", "quant.rules.mid.activation.bits=4"],
     "weights_only leaves activations float, but quant.rules.mid.activation.bits = 4"),
    (["quant.weight.normalization=lwm"], "quant.weight.normalization = 'lwm'. Did you mean 'lwn'"),
    (["quant.activation.normalization=wn"], "quant.activation.normalization = wn: only weights are normalized"),
    (["quant.rules.edges.weight.normalization=l2"],
     "quant.rules.edges.weight.normalization = 'l2'. Did you mean 'lwn'"),
])
def test_what_contradicts_itself_is_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        from_command_line(*arguments)


def test_a_float_recipe_is_float_under_every_preset():
    for preset in ("paper", "none", "weights_only"):
        assert is_float(load_recipe(FLOAT, [f"quant.preset={preset}"]))
    both = ["quant.weight.quantizer=fp", "quant.activation.quantizer=fp"]
    assert is_float(load_recipe(W2A2, ["quant.preset=none", *both]))
    assert not is_float(load_recipe(W2A2, ["quant.preset=weights_only", *both]))  # the edges' weights


def test_a_preset_is_an_axis_of_a_search(monkeypatch):
    from tune.space import base_recipe, load_search, studies
    monkeypatch.chdir(ROOT)
    search = load_search(ROOT / "configs/search/demo.yaml", [
        "studies.preset.key=quant.preset", "studies.preset.values=[paper,none,weights_only]"])
    recipes = {study.overrides["quant.preset"]: base_recipe(search, study.overrides) for study in studies(search)}
    first = {preset: settings(nulsq.quantize_(small(), recipe.quant))["stem"] for preset, recipe in recipes.items()}
    assert first["paper"] == ("minmax 8", "minmax 8") and first["weights_only"] == ("minmax 8", "float")
    assert first["none"] == ("lsq 2", "lsq 2")  # the last axis of the demo: LSQ activations


# ---- settings of a side


def test_a_quantizer_brings_its_own_normalization_and_a_setting_wins():
    def normalizations(**weight):
        policy = Policy(bits=4, weight=SideRule(**weight))
        return [layer.normalization for layer in nulsq.quantize_(small(), policy).modules()
                if hasattr(layer, "weight_quantizer")]
    assert normalizations(quantizer="lsq") == ["none"] * 4
    assert normalizations(quantizer="lcq") == ["none", "lwn", "lwn", "none"]  # MinMax edges have their own
    assert normalizations(quantizer="apot") == ["none", "lwn", "lwn", "none"]
    assert normalizations(quantizer="lcq", normalization="none") == ["none"] * 4
    assert normalizations(quantizer="lsq", normalization="wn") == ["none", "wn", "wn", "none"]


def test_scales_that_do_not_learn_stay_as_calibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    policy = Policy(preset="none", rules={}, weight=SideRule("nulsq", learn_scale=False))
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    nulsq.calibrate_(nulsq.quantize_(model, policy), [x])
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    nulsq.follow_step_(optimizer, model)
    model.train()(x).square().sum().backward()
    optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == ("weight_quantizer" in name), name


def test_shares_are_a_plain_number_on_every_quantizer():
    assert {quantizer.batch_shards for quantizer in nulsq.quantizers_of(nulsq.quantize_(small()))} == {1}
    eight = nulsq.quantize_(small(), batch_shards=8)
    assert {quantizer.batch_shards for quantizer in nulsq.quantizers_of(eight)} == {8}
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=f"batch_shards = {wrong}, allowed"):
            nulsq.quantize_(small(), batch_shards=wrong)


# ---- the summary


def test_the_summary_is_a_table_with_roles_and_what_is_learned_how():
    policy = Policy(bits=4, weight=SideRule("lcq", per_channel=True, learn_scale=False),
                    activation=SideRule("lsq", grad_scale="lsq"),
                    rules=Policy().rules | {"dw": LayerRule(["role:depthwise"], weight=SideRule("nulsq", bits=3))})
    text = nulsq.summary(nulsq.quantize_(small(), policy))
    assert text.splitlines() == [
        "layer             type         role        weight                         activation",
        "stem              QuantConv2d  first       minmax 8b signed               minmax 8b sign?",
        "block.conv        QuantConv2d  depthwise   nulsq 3b signed                lsq 4b sign?",
        "block.downsample  QuantConv2d  downsample  lcq 4b signed per channel lwn  lsq 4b sign?",
        "head              QuantLinear  last        minmax 8b signed               minmax 8b sign?",
        "gradient scale of the steps: 1 x none (nulsq weights), 2 x lsq (lsq activations)",
        "not learned, as calibrated: 1 x lcq weights",
    ]


def test_a_layer_that_is_first_and_last_has_both_roles():
    model = nulsq.quantize_(nn.Sequential(nn.Linear(3, 2)))
    assert nulsq.summary(model).splitlines()[1].split()[:3] == ["0", "QuantLinear", "first,last"]
    assert quantizable(nn.Sequential(nn.Linear(3, 2))) == ["0"]
