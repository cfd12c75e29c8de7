"""Attention with quantized products: equals attention written out in float64, for every kind that has an adapter."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nulsq
from nulsq import LayerRule, Policy, SideRule
from nulsq.cost import cost_of
from nulsq.quant.attention import OPERANDS, QuantizedAttention, quantize_attention_
from nulsq.quant.attention_adapters import ADAPTERS, adapter_of, reads_nothing
from nulsq.quant.layers import QuantizedLayer

PRODUCTS = {"products": LayerRule(match=["role:attention"])}


def policy(bits=4, **options):
    return Policy(bits=bits, preset="none", rules=PRODUCTS, **options)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(layer, name):
    """The function of a quantizer, in float64: the level of the value in float32, which is what decides."""
    quantizer = getattr(layer, f"{name}_quantizer")
    return lambda x: x if quantizer is None else quantizer.decode(quantizer.encode(x.float())).double()


def linear(layer, x, bias=None):
    """A quantized linear layer, written out."""
    bias = layer.bias if bias is None else bias
    y = exact(layer, "activation")(x) @ exact(layer, "weight")(layer.weight).T
    return y if bias is None else y + bias.double()


def attend(module, q, k, v, scale, bias=0.0):
    q, k, v = (exact(module, name)(x) for name, x in (("query", q), ("key", k), ("value", v)))
    probability = ((q @ k.transpose(-2, -1)) * scale + bias).softmax(-1)
    return exact(module, "probability")(probability) @ v


def heads(qkv, count):
    return qkv.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4)


def joined(x):
    return x.transpose(1, 2).flatten(2)


# ---- the same, written out: module, input -> output in float64


def of_vit(module, x):
    q, k, v = heads(linear(module.qkv, x), module.num_heads)
    if module.fused_attn:
        return linear(module.proj, joined(attend(module, q, k, v, module.scale)))
    return linear(module.proj, joined(attend(module, q * module.scale, k, v, 1)))


def of_beit(module, x):
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    q, k, v = heads(linear(module.qkv, x, bias), module.num_heads)
    relative = module._get_rel_pos_bias().double()
    return linear(module.proj, joined(attend(module, q, k, v, module.scale, relative)))


def of_eva(module, x):
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    q, k, v = heads(linear(module.qkv, x, bias), module.num_heads)
    return linear(module.proj, joined(attend(module, q, k, v, module.scale)))


def of_swin(module, x):
    q, k, v = heads(linear(module.qkv, x), module.num_heads)
    scale = 1 if not module.fused_attn else module.scale
    q = q if module.fused_attn else q * module.scale
    return linear(module.proj, joined(attend(module, q, k, v, scale, module._get_rel_pos_bias().double())))


def of_swin_v2(module, x):
    """Cosine attention; timm's and torchvision's, for one window."""
    if hasattr(module, "q_bias"):
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        table = cosine_table(module.cpb_mlp, module.relative_coords_table, module.relative_position_index,
                             module.num_heads)
        x_tokens = x
    else:
        width = module.qkv.bias.numel() // 3
        bias = module.qkv.bias.clone()
        bias[width:2 * width] = 0
        table = module.get_relative_position_bias().double()
        x_tokens = x.flatten(1, 2)
    q, k, v = heads(linear(module.qkv, x_tokens, bias), module.num_heads)
    scale = module.logit_scale.double().clamp(max=math.log(100)).exp()
    y = attend(module, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale, table)
    return linear(module.proj, joined(y)).view(x.shape)


def cosine_table(mlp, coordinates, index, count):
    with torch.no_grad():
        table = mlp(coordinates).view(-1, count)[index.view(-1)]
    side = math.isqrt(index.numel())
    return 16 * table.view(side, side, count).permute(2, 0, 1).double().sigmoid()


def of_torchvision_swin(module, x):
    q, k, v = heads(linear(module.qkv, x.flatten(1, 2)), module.num_heads)
    y = attend(module, q * q.shape[-1] ** -0.5, k, v, 1, module.get_relative_position_bias().double())
    return linear(module.proj, joined(y)).view(x.shape)


def of_torch(module, x):
    q, k, v = heads(linear(module, x, module.in_proj_bias), module.num_heads)
    return linear(module.out_proj, joined(attend(module, q, k, v, q.shape[-1] ** -0.5)))


def build(kind):
    """A module of each kind with 16 tokens of width 32 and 4 heads; its oracle; its input."""
    if kind == "torch":
        return nn.MultiheadAttention(32, 4, batch_first=True), of_torch, tokens(2, 16, 32)
    if kind.startswith("torchvision"):
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        cls, oracle = ((swin.ShiftedWindowAttentionV2, of_swin_v2) if kind.endswith("v2")
                       else (swin.ShiftedWindowAttention, of_torchvision_swin))
        return cls(32, [4, 4], [0, 0], 4), oracle, tokens(2, 4, 4, 32)
    pytest.importorskip("timm")
    from timm.layers.attention import Attention
    from timm.models import beit, eva, swin_transformer, swin_transformer_v2
    module, oracle = {
        "vit": lambda: (Attention(32, 4, qkv_bias=True), of_vit),
        "vit_plain": lambda: (Attention(32, 4, qkv_bias=True), of_vit),
        "beit": lambda: (beit.Attention(32, 4, qkv_bias=True, window_size=(3, 5)), of_beit),
        "eva": lambda: (eva.EvaAttention(32, 4, qkv_bias=True, scale_norm=False), of_eva),
        "swin": lambda: (swin_transformer.WindowAttention(32, 4, window_size=4), of_swin),
        "swin_plain": lambda: (swin_transformer.WindowAttention(32, 4, window_size=4), of_swin),
        "swin_v2": lambda: (swin_transformer_v2.WindowAttention(32, (4, 4), 4), of_swin_v2),
    }[kind]()
    if hasattr(module, "fused_attn"):
        module.fused_attn = not kind.endswith("_plain")
    return module, oracle, tokens(2, 16, 32)


KINDS = ["torch", "torchvision", "torchvision_v2", "vit", "vit_plain", "beit", "eva", "swin", "swin_plain", "swin_v2"]


class Alone(nn.Module):
    """A network of one attention."""

    def __init__(self, module):
        super().__init__()
        self.attn = module

    def forward(self, x):
        return self.attn(x, x, x)[0] if isinstance(self.attn, nn.MultiheadAttention) else self.attn(x)


def quantized(kind, chosen=None):
    torch.manual_seed(0)
    module, oracle, x = build(kind)
    for parameter in module.parameters():  # biases that start at zero and small tables would hide a mistake
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    model = nulsq.quantize_(Alone(module).eval(), policy() if chosen is None else chosen)
    return nulsq.calibrate_(model, [x]), oracle, x


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_attention_equals_attention_written_out(kind):
    model, oracle, x = quantized(kind)
    with torch.no_grad():
        actual, expected = model(x), oracle(model.attn, x.double())
    # A value within rounding of a threshold may take another level: few do.
    close = torch.isclose(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert close.float().mean() > 0.9, kind
    assert float((actual - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_every_operand_and_layer_is_quantized_learns_and_is_counted(kind):
    model, _, x = quantized(kind)
    assert isinstance(model.attn, QuantizedAttention)
    quantizers = [getattr(model.attn, f"{operand}_quantizer") for operand in OPERANDS]
    assert all(quantizer.calibrated for quantizer in quantizers)
    assert not model.attn.probability_quantizer.signed and model.attn.query_quantizer.signed
    model.train()(x).square().sum().backward()
    for name, module in model.named_modules():
        if isinstance(module, nulsq.Quantizer) and "cpb_mlp" not in name:  # its few coordinates may all be levels
            assert all(p.grad is not None and p.grad.any() for p in module.parameters()), name
    cost = cost_of(model, x[:1])
    assert cost.other_macs == 0
    assert {name: product.macs for name, product in cost.products.items()} == {
        "attn.query": 16 * 16 * 32, "attn.probability": 16 * 16 * 32}
    assert all(product.weight_bits == product.activation_bits == 4 for product in cost.products.values())
    layers = 16 * 32 * 32 * 4  # queries, keys, values and the output
    assert sum(layer.macs for name, layer in cost.layers.items() if "cpb_mlp" not in name) == layers
    row = next(line for line in nulsq.summary(model).splitlines() if line.startswith("attn: probability x value"))
    assert row.endswith("nulsq 4b unsigned")
    assert model.quantized_share.share == 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_rule_the_products_stay_float(kind):
    model, _, x = quantized(kind, Policy(bits=4, preset="none"))
    assert all(getattr(model.attn, f"{operand}_quantizer", None) is None for operand in OPERANDS)
    assert "the two products inside attention" in nulsq.summary(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.MultiheadAttention)]
    assert all(isinstance(layer, QuantizedLayer) for layer in layers)
    cost = cost_of(model, x[:1])
    assert cost.other_macs == 2 * 16 * 16 * 32 and not cost.products


@pytest.mark.parametrize("kind", KINDS)
def test_weights_alone_leave_products_float(kind):
    model, _, _ = quantized(kind, Policy(bits=4, preset="weights_only", rules=PRODUCTS))
    assert not any(getattr(model.attn, f"{operand}_quantizer", None) for operand in OPERANDS)


@pytest.mark.parametrize("kind", KINDS)
def test_copied_pickled_and_loaded_attention_computes_the_same(kind):
    model, _, x = quantized(kind)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        torch.manual_seed(1)
        other = nulsq.quantize_(Alone(build(kind)[0]).eval(), policy())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_attention_is_the_float_one(kind):
    torch.manual_seed(0)
    module, _, x = build(kind)
    model = Alone(module).eval()
    before, keys = type(module), list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        nulsq.calibrate_(nulsq.quantize_(model, policy()), [x])
        assert not torch.equal(model(x), expected)
        nulsq.dequantize_(model)
        assert torch.equal(model(x), expected)
    assert type(module) is before and list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["vit", "swin_v2", "torch"])
def test_compiled_and_exported_attention_computes_the_same(kind):
    model, _, x = quantized(kind)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()(x)
        torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)


# ---- torch's own attention


def masks(case):
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.zeros(5, 5).masked_fill(causal, -torch.inf)},
        "per head": {"attn_mask": causal.expand(6, 5, 5)},
        "causal hint": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])},
        "both": {"attn_mask": causal, "key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
        "every head's weights": {"average_attn_weights": False},
    }[case]


@pytest.mark.parametrize("case", ["none", "bool", "float", "per head", "causal hint", "padding", "both",
                                  "every head's weights"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("crossed", [False, True])
def test_forward_of_ours_equals_torchs(case, batch_first, crossed):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    shape = (3, 5, 8) if batch_first else (5, 3, 8)
    query, key = tokens(*shape), tokens(*shape, seed=1) if crossed else None
    key = query if key is None else key
    with torch.no_grad():
        expected, weights = module(query, key, key, **masks(case))
        quantize_attention_(module, {})
        actual, own_weights = module(query, key, key, **masks(case))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(own_weights, weights)
    with torch.no_grad():
        actual, own_weights = module(query, key, key, need_weights=False, **masks(case))
    torch.testing.assert_close(actual, expected)
    assert own_weights is None


def test_forward_of_ours_takes_inputs_without_a_batch():
    module = nn.MultiheadAttention(8, 2).eval()
    x = tokens(5, 8)
    with torch.no_grad():
        expected = module(x, x, x)
        quantize_attention_(module, {})
        for actual, reference in zip(module(x, x, x), expected, strict=True):
            torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("options", [{"kdim": 6, "vdim": 7}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_unusual_attention_of_torch_stays_float_and_is_named(options):
    model = nn.Sequential(nn.Linear(8, 8))
    model.attention = nn.MultiheadAttention(8, 2, **options)
    assert adapter_of(model.attention) is None
    with pytest.warns(UserWarning, match="attention.out_proj"):
        nulsq.quantize_(model, Policy(bits=4, preset="none"))
    assert not isinstance(model.attention, QuantizedLayer)


def test_transformer_layers_of_torch_are_quantized_whole():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = tokens(3, 5, 8)
    with torch.no_grad():
        expected = model(x)
        nulsq.calibrate_(nulsq.quantize_(model, policy(8)), [x])
        assert cost_of(model, x[:1]).other_macs == 0
        actual = model(x)
        assert 0 < float((actual - expected).norm() / expected.norm()) < 0.05
        nulsq.dequantize_(model)
        torch.testing.assert_close(model(x), expected)
    assert model.use_nested_tensor and not model.layers[0]._forward_pre_hooks


# ---- what has no adapter


class Other(nn.Module):
    """Attention that nobody knows."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class OtherAttention(Other):
    pass


def test_attention_without_an_adapter_is_named():
    model = nulsq.quantize_(nn.Sequential(OtherAttention()), Policy(bits=4, preset="none"))
    assert "1 x OtherAttention" in nulsq.summary(model)
    with pytest.raises(ValueError, match="role:attention"):
        nulsq.quantize_(nn.Sequential(OtherAttention()), policy())


def test_an_adapter_of_ones_own(monkeypatch):
    monkeypatch.setitem(ADAPTERS, f"{__name__}.OtherAttention", reads_nothing)
    monkeypatch.setattr(OtherAttention, "forward", Other.forward, raising=False)
    model = nulsq.calibrate_(nulsq.quantize_(nn.Sequential(OtherAttention()), policy()), [tokens(2, 5, 8)])
    assert model[0].probability_quantizer.calibrated


def test_a_forward_that_computes_something_else_is_an_error(monkeypatch):
    class Changed(Other):
        def forward(self, x):
            return super().forward(x) @ torch.eye(8)

    monkeypatch.setitem(ADAPTERS, f"{__name__}.{Changed.__qualname__}", reads_nothing)
    model = nulsq.quantize_(nn.Sequential(Changed()), policy())
    with pytest.raises(RuntimeError, match="3 matrix products"):
        nulsq.calibrate_(model, [tokens(2, 5, 8)])


def test_bits_of_the_products_are_the_rules():
    chosen = Policy(bits=2, preset="none", rules={
        "products": LayerRule(match=["role:attention"], activation=SideRule("lsq", bits=6))})
    model = nulsq.calibrate_(nulsq.quantize_(Alone(nn.MultiheadAttention(8, 2)), chosen), [tokens(5, 3, 8)])
    assert {getattr(model.attn, f"{operand}_quantizer").bits for operand in OPERANDS} == {6}
    assert model.attn.weight_quantizer.bits == model.attn.activation_quantizer.bits == 2
    assert model.attn.query_quantizer.name() == "lsq"
