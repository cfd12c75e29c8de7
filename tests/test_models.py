"""Architectures of the three model libraries: every layer is quantized, one step trains, the rest is listed as float.

Weights are random, batches have two images, and images are as small as the architecture accepts.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nulsq
from nulsq.config import Recipe, load
from nulsq.models.libraries import build_model
from nulsq.models.network import build_network
from nulsq.quant.layers import QuantizedLayer

timm = pytest.importorskip("timm")
pytest.importorskip("pytorchcv")
pytest.importorskip("torchvision")

ROOT = Path(__file__).resolve().parent.parent
LAYERS = nn.Conv2d | nn.Linear

# Network, classes, image size, bits, weight and activation quantizer. pytorchcv's ImageNet networks end in a 7x7
# pooling, which needs at least 193 pixels.
NETWORKS = [
    ("pytorchcv:preresnet20_cifar10", 10, 32, 2, "lsq", "nulsq"),
    ("pytorchcv:preresnet20_cifar100", 100, 32, 2, "nulsq", "nulsq"),
    ("pytorchcv:preresnet56_cifar10", 10, 32, 4, "apot", "apot"),
    ("pytorchcv:preresnet56_cifar100", 100, 32, 2, "uniq", "uniq"),
    ("pytorchcv:preresnet18", 10, 193, 2, "lsq", "nulsq"),
    ("pytorchcv:preresnet34", 10, 193, 4, "lcq", "lcq"),
    ("pytorchcv:mobilenetv2_w1", 10, 193, 4, "nulsq", "nulsq"),
    ("torchvision:resnet18", 10, 64, 2, "lcq", "nulsq"),
    ("torchvision:resnet50", 10, 64, 4, "lsq", "lsq"),
    ("timm:resnet18", 10, 64, 2, "apot", "lsq"),
    ("timm:mobilenetv2_100", 10, 64, 4, "lsq", "nulsq"),
    ("timm:efficientnet_lite0", 10, 64, 2, "uniq", "nulsq"),
    ("timm:deit_tiny_patch16_224", 10, 64, 4, "nulsq", "nulsq"),
    ("timm:swin_tiny_patch4_window7_224", 10, 64, 2, "lsq", "nulsq"),
    ("timm:convnext_tiny", 10, 64, 4, "lcq", "lsq"),
]
# Some defaults of timm leave layers without a gradient in the first step: the last norm of a block starts at zero, or
# whole blocks are dropped at random. The image size of a transformer is fixed at construction.
TIMM_OPTIONS = {"timm:resnet18": {"zero_init_last": False}, "timm:deit_tiny_patch16_224": {"img_size": 64},
                "timm:swin_tiny_patch4_window7_224": {"img_size": 64, "drop_path_rate": 0}}


def float_network(name, classes):
    torch.manual_seed(0)
    if name in TIMM_OPTIONS:
        return timm.create_model(name.partition(":")[2], num_classes=classes, **TIMM_OPTIONS[name])
    return build_model(name, classes)


def images(size, seed=0):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "classes", "size", "bits", "weight", "activation"), NETWORKS,
                         ids=[f"{name}-w{bits}a{bits}" for name, _, _, bits, *_ in NETWORKS])
def test_every_layer_is_quantized_and_receives_gradients(name, classes, size, bits, weight, activation):
    model = float_network(name, classes)
    expected = [path for path, module in model.named_modules() if isinstance(module, LAYERS)]
    policy = nulsq.Policy(bits=bits, weight=nulsq.SideRule(weight), activation=nulsq.SideRule(activation))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays float, nothing is clipped to zero
        nulsq.quantize_(model, policy)
        nulsq.calibrate_(model, [images(size)])
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    assert list(layers) == expected
    assert all(layer.weight_quantizer and layer.activation_quantizer for layer in layers.values())

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    nulsq.follow_step_(optimizer, model)
    F.cross_entropy(model.train()(images(size, seed=1)), torch.tensor([0, 1])).backward()
    for path, module in model.named_modules():
        gradients = [parameter.grad for parameter in module.parameters(recurse=False)]
        if isinstance(module, nulsq.Quantizer | LAYERS) and gradients:
            assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients), path
            assert any(gradient.any() for gradient in gradients), path
    optimizer.step()
    assert all(value.isfinite().all() for value in model.parameters())

    with torch.no_grad():
        logits = model.eval()(images(size, seed=1))
    assert logits.shape == (2, classes) and logits.isfinite().all()


def test_activations_after_linear_bottlenecks_and_layer_norms_are_signed():
    mobile = nulsq.calibrate_(nulsq.quantize_(float_network("timm:mobilenetv2_100", 10)), [images(64)])
    assert mobile.blocks[1][1].conv_pw.activation_quantizer.signed  # the block before ends without an activation
    assert not mobile.blocks[1][1].conv_dw.activation_quantizer.signed  # after a ReLU6
    deit = nulsq.calibrate_(nulsq.quantize_(float_network("timm:deit_tiny_patch16_224", 10)), [images(64)])
    assert deit.blocks[3].attn.qkv.activation_quantizer.signed  # after a LayerNorm
    assert deit.blocks[3].mlp.fc2.activation_quantizer.signed  # after a GELU


# ---- what stays float


@pytest.mark.parametrize(("name", "lines"), [
    ("timm:deit_tiny_patch16_224", [
        "stays float: 25 x LayerNorm, 1 x cls_token of VisionTransformer, 1 x pos_embed of VisionTransformer",
        "stays float: the two products inside attention (12 x Attention); a rule that matches role:attention quantizes "
        "them"]),
    ("timm:swin_tiny_patch4_window7_224", [
        "stays float: 29 x LayerNorm, 12 x relative_position_bias_table of WindowAttention",
        "stays float: the two products inside attention (12 x WindowAttention); a rule that matches role:attention "
        "quantizes them"]),
    ("timm:convnext_tiny", ["stays float: 5 x LayerNorm2d, 18 x LayerNorm, 18 x gamma of ConvNeXtBlock"]),
    ("pytorchcv:preresnet20_cifar10", ["stays float: 19 x BatchNorm2d"]),
])
def test_summary_lists_parameters_and_products_that_stay_float(name, lines):
    text = nulsq.summary(nulsq.quantize_(float_network(name, 10)))
    assert [line for line in text.splitlines() if line.startswith("stays float")] == lines


@pytest.mark.parametrize(("name", "class_name"), [
    ("timm:tf_efficientnet_lite0", "QuantConv2dSame"), ("timm:nf_resnet26", "QuantScaledStdConv2d")])
def test_convolutions_that_pad_or_standardize_are_quantized_with_that_kept(name, class_name):
    """At 8 bits the network computes what the float network does, so nothing of the layers' own work is lost."""
    torch.manual_seed(0)
    model, x = build_model(name, 10), images(64, seed=1)
    model(images(64))  # batch norms get statistics
    with torch.no_grad():
        expected = model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays float
        nulsq.quantize_(model, nulsq.Policy(bits=8, preset="none", weight=nulsq.SideRule("lsq", per_channel=True)))
    nulsq.calibrate_(model, [x])
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    assert all(isinstance(layer, QuantizedLayer) for layer in layers)
    assert class_name in {type(layer).__name__ for layer in layers}
    with torch.no_grad():
        actual = model(x)
    assert float((actual - expected).norm() / expected.norm()) < 0.1


def test_layers_that_an_attention_uses_without_calling_them_are_quantized():
    """Torchvision's Swin and torch's own attention give weights to a function."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays float
        nulsq.quantize_(model)
        swin = nulsq.quantize_(build_model("torchvision:swin_t", 10))
        nulsq.calibrate_(swin, [images(64)])
    attention = model[2].self_attn
    assert attention.weight_quantizer.bits == attention.out_proj.weight_quantizer.bits == 2
    assert "stays float: the two products inside attention (1 x QuantMultiheadAttention)" in nulsq.summary(model)
    assert swin.features[1][0].attn.qkv.activation_quantizer.calibrated


# ---- published weights


def run_offline(code, home):
    """Run code in a new interpreter with empty caches and without network access."""
    block_network = ("import socket, sys\n"
                     "def refuse(*args, **kwargs): raise socket.gaierror(-2, 'Name or service not known')\n"
                     "socket.getaddrinfo = socket.socket.connect = refuse\n")
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HOME": str(home), "TORCH_HOME": str(home / "torch"), "HF_HOME": str(home / "hf")}
    for key in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME"):
        environment.pop(key, None)
    return subprocess.run([sys.executable, "-c", block_network + code], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=120)


def test_unreachable_published_weights_give_a_one_line_error_for_each_library(tmp_path):
    code = """
from nulsq.models.libraries import build_model
for name, classes in (("pytorchcv:preresnet20_cifar10", 10), ("torchvision:resnet18", 1000), ("timm:resnet18", 1000)):
    try: build_model(name, classes, pretrained=True)
    except ValueError as error: print(type(error).__name__, error)
"""
    process = run_offline(code, tmp_path)
    assert "etrying" not in process.stderr  # no library retried
    assert process.stdout.splitlines() == [
        f"InputError model.pretrained: no published weights of {name} with {classes} classes are cached or reachable "
        f"({server} does not answer); give a file with model.init_from"
        for name, classes, server in (("pytorchcv:preresnet20_cifar10", 10, "github.com"),
                                      ("torchvision:resnet18", 1000, "download.pytorch.org"),
                                      ("timm:resnet18", 1000, "huggingface.co"))]


def test_cached_published_weights_load_without_network_access(tmp_path):
    """The caches of torch.hub and the Hugging Face hub have the layout of the libraries, with random weights."""
    from safetensors.torch import save_file
    from torchvision.models import ResNet18_Weights, resnet18
    torch.manual_seed(1)
    weights = resnet18().state_dict()
    hub, snapshot = tmp_path / "torch/hub/checkpoints", tmp_path / "hf/hub/models--timm--resnet18.a1_in1k/snapshots/1"
    hub.mkdir(parents=True)
    torch.save(weights, hub / Path(ResNet18_Weights.DEFAULT.url).name)
    snapshot.mkdir(parents=True)
    save_file(timm.create_model("resnet18").state_dict() | weights, snapshot / "model.safetensors")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("1")
    torch.save(weights["conv1.weight"], tmp_path / "conv1.pth")
    code = f"""
import torch
from nulsq.models.libraries import build_model
expected = torch.load({str(tmp_path / 'conv1.pth')!r})
for name, classes in (("torchvision:resnet18", 1000), ("timm:resnet18", 1000), ("timm:resnet18", 10)):
    model = build_model(name, classes, pretrained=True)
    print(name, torch.equal(model.conv1.weight, expected), model.fc.out_features)
"""
    process = run_offline(code, tmp_path)
    assert process.stdout.splitlines() == ["torchvision:resnet18 True 1000", "timm:resnet18 True 1000",
                                           "timm:resnet18 True 10"], process.stderr
    warning = "UserWarning: the published weights of timm:resnet18 have 1000 classes, this network has 10"
    assert warning in process.stderr
    assert process.stderr.count("UserWarning") == 1


def test_error_for_unknown_tag_of_published_weights_suggests_similar_tags():
    with pytest.raises(ValueError, match="timm has no such network. Did you mean .*resnet18.a1_in1k"):
        build_model("timm:resnet18.a1_in1", 10)


# ---- from the recipe


def test_quantizers_get_bits_and_batch_shards_of_the_recipe():
    recipe = load(Recipe, None, ["model.name=torchvision:resnet18", "quant.preset=none", "quant.bits=3"])
    model = build_network(recipe, 10, batch_shards=6)
    quantizers = nulsq.quantizers_of(model)
    assert {(quantizer.bits, quantizer.batch_shards) for quantizer in quantizers} == {(3, 6)}
    assert build_network(recipe, 10).conv1.weight_quantizer.batch_shards == 1
