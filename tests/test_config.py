"""Recipes and command lines: errors name the key, the bad value, the allowed values and a similar name."""

import json
from pathlib import Path

import pytest

from nulsq.config import Recipe, flatten, load, load_recipe, to_yaml
from nulsq.config.command_line import parse, parser
from nulsq.config.holdout import Holdout, parse_holdout
from nulsq.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
W2A2 = ROOT / "configs/recipes/digits/w2a2.yaml"


@pytest.mark.parametrize(("override", "message"), [
    ("optim.lrr=1", "optim.lrr: .*Did you mean: 'lr'.*Allowed: optimizer, lr"),
    ("optm.lr=1", "optm: .*Did you mean: 'optim'"),
    ("quant.bits=0", "quant.bits = 0, allowed: at least 1 and at most 8"),
    ("quant.bits=two", "quant.bits: .*could not be converted to Integer"),
    ("quant.rules.edges.bits=12", "quant.rules.edges.bits = 12, allowed"),
    ("quant.rules.edges.bit=4", "quant.rules.edges.bit: .*Did you mean: 'bits'"),
    ("optim.lr=-0.1", "optim.lr = -0.1, allowed: above 0"),
    ("optim.lr=.nan", "optim.lr = nan"),
    ("optim.epochs=true", "optim.epochs: .*'True' of type 'bool'"),
    ("data.crop=padd", "data.crop: .*expected one of"),
    ("optim.lr", "not of the form key.path=value"),
    ("quant.bits=3.5", "quant.bits: "),
    ("optim=3", "Merge error"),
])
def test_error_for_invalid_override_names_the_key(override, message):
    with pytest.raises(InputError, match=message):
        load(Recipe, W2A2, [override])


def test_overrides_parse_exponents_and_accept_a_dict_or_dotted_text():
    assert load(Recipe, None, ["optim.lr=1e-4"]).optim.lr == 1e-4
    assert load(Recipe, None, {"optim.lr": 1e-4, "quant.rules.edges.bits": 4}) == \
        load(Recipe, None, ["optim.lr=1e-4", "quant.rules.edges.bits=4"])


def test_saved_recipe_loads_back_equal(tmp_path):
    recipe = load_recipe(W2A2, ["quant.rules.mid.match=[a.b,c*]", "quant.weight.options.x=1", "optim.clip_norm=2"])
    (tmp_path / "r.yaml").write_text(to_yaml(recipe))
    assert load(Recipe, tmp_path / "r.yaml") == recipe
    assert flatten(recipe)["quant.rules.mid.match"] == ["a.b", "c*"]


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\x00\x01", "optim: {lr: {}}\n", ""])
def test_file_without_a_recipe_is_an_input_error_and_an_empty_file_is_the_default(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    if content == "":
        assert load(Recipe, path) == load(Recipe)
    else:
        with pytest.raises(InputError):
            load(Recipe, path)


def test_error_for_missing_file_suggests_similar_files():
    with pytest.raises(InputError, match="no file .*there are: .*w2a2.yaml"):
        load(Recipe, W2A2.with_name("w2a3.yaml"))


def test_the_published_options_equal_dotted_overrides():
    arguments = ["--lr", "0.03", "--coeff_qparm_lr", "0.02", "--weight_decay", "2e-4", "--qparm_wd", "3e-4",
                 "--x_quantizer", "Positive_nuLSQ_quantizer", "--w_quantizer", "LSQ_quantizer",
                 "--initializer", "LSQ_initializer", "--num_bits", "3", "--train_id", "7", "--init_from", "a b.pth"]
    _, published = parse(parser("x", ""), [str(W2A2), *arguments])
    dotted = load_recipe(W2A2, [
        "optim.lr=0.03", "optim.coeff_qparm_lr=0.02", "optim.weight_decay=2e-4", "optim.qparm_wd=3e-4",
        "quant.activation.quantizer=nulsq", "quant.activation.signed=false", "quant.weight.quantizer=lsq",
        "quant.weight.init=lsq", "quant.activation.init=lsq", "quant.bits=3", "run.train_id='7'",
        "model.init_from='a b.pth'"])
    assert published == dotted


def test_dotted_and_published_options_mix_in_any_order():
    _, recipe = parse(parser("x", ""), [str(W2A2), "--num_bits", "4", "optim.epochs=3", "--lr=0.5", "data.batch=8"])
    assert (recipe.quant.bits, recipe.optim.epochs, recipe.optim.lr, recipe.data.batch) == (4, 3, 0.5, 8)


def test_fp_for_weights_and_activations_selects_the_float_network():
    from nulsq.models.network import is_float
    _, recipe = parse(parser("x", ""), [str(W2A2), "--x_quantizer", "FP", "--w_quantizer", "FP"])
    assert is_float(recipe)
    _, recipe = parse(parser("x", ""), [str(W2A2), "--x_quantizer", "FP"])
    assert not is_float(recipe)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--x_quantizer", "Positive_nuLSQ"], "Did you mean 'Positive_nuLSQ_quantizer'"),
    (["--w_quantizer", "Positive_nuLSQ_quantizer"], "weights are signed"),
    (["--initializer", "NMSE"], "Did you mean 'NMSE_initializer'"),
    (["--num_bit", "3"], "unrecognized arguments: --num_bit 3. Did you mean '--num_bits'"),
    (["--num_bits", "0"], "quant.bits = 0"),
])
def test_invalid_published_option_is_an_input_error(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(parser("x", ""), [str(W2A2), *arguments])


def test_help_lists_every_setting():
    text = parser("python -m nulsq.train", "").format_help()
    for key in ("optim.coeff_qparm_lr=0.01", "data.holdout=stratified:0.1", "quant.bits=2", "--x_quantizer"):
        assert key in text


@pytest.mark.parametrize(("override", "message"), [
    ("quant.weight.quantizer=nulsqq", "quant.weight.quantizer: no quantizer 'nulsqq'. Did you mean 'nulsq'"),
    ("quant.activation.init=nmsee", "quant.activation.init = 'nmsee'. Did you mean 'nmse'"),
    ("quant.rules.edges.weight.ste=clipp", "quant.rules.edges.weight.ste = 'clipp'. Did you mean 'clip'"),
    ("quant.weight.grad_scale=paper", "quant.weight.grad_scale = 'paper'. Allowed: none, lsq, channels"),
    ("data.holdout=random:0.1", "data.holdout = 'random:0.1'. Allowed: stratified:SHARE"),
    ("data.holdout=strat:0.1", "data.holdout = 'strat:0.1'. Did you mean 'stratified'"),
    ("optim.warmup_epochs=6", "optim.warmup_epochs = 6.0, allowed: below optim.epochs = 6"),
])
def test_names_and_combinations_are_checked_before_data_is_read(override, message):
    with pytest.raises(InputError, match=message):
        load_recipe(W2A2, ["data.path=/nowhere", override])
    with pytest.raises(InputError, match="needs optim.momentum above 0"):
        load_recipe(W2A2, ["optim.nesterov=true", "optim.momentum=0"])


@pytest.mark.parametrize(("text", "holdout"), [
    ("stratified:0.1", Holdout("stratified", share=0.1)),
    ("stratified:1e-1", Holdout("stratified", share=0.1)),
    ("stratified : .1", Holdout("stratified", share=0.1)),
    ("last:5", Holdout("last", count=5)),
    ("last: 5", Holdout("last", count=5)),
    (" last:+5 ", Holdout("last", count=5)),
    ("none", Holdout("none")),
])
def test_holdout_parses_equally_in_files_overrides_and_on_the_command_line(text, holdout, tmp_path):
    import numpy as np

    from nulsq.data.order import split
    (tmp_path / "r.yaml").write_text(f"data: {{holdout: {json.dumps(text)}}}\n")
    recipes = [load_recipe(tmp_path / "r.yaml"), load_recipe(W2A2, {"data.holdout": text}),
               parse(parser("x", ""), [str(W2A2), f"data.holdout={text}"])[1]]
    for recipe in recipes:
        assert parse_holdout(recipe.data.holdout) == holdout
        train, val = split(np.arange(40) % 2, recipe.data.holdout, 0)
        assert len(val) == {"stratified": 4, "last": 5, "none": 0}[holdout.form] and len(train) + len(val) == 40


@pytest.mark.parametrize("text", ["last:0", "last:-5", "last:5.0", "last:", "last", "stratified:0", "stratified:1",
                                  "stratified:nan", "stratified:inf", "none:", "none:3", "random:0.1", "", "5"])
def test_error_for_invalid_holdout_lists_the_allowed_values(text):
    with pytest.raises(InputError, match="data.holdout = .*Allowed: stratified:SHARE with .*, last:N .*, or none"):
        load_recipe(W2A2, {"data.holdout": text})


def test_text_settings_accept_a_colon_and_mapping_settings_parse_as_mappings():
    assert load(Recipe, W2A2, ["model.name=a: b"]).model.name == "a: b"
    assert load(Recipe, W2A2, ["optim={lr: 0.5}"]).optim.lr == load(Recipe, W2A2, ["optim=lr: 0.5"]).optim.lr == 0.5
    with pytest.raises(InputError, match="data.holdout: "):
        load(Recipe, W2A2, ["data.holdout={last: 5}"])
