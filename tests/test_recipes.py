"""The shipped recipes set only what differs from their base; ImageNet recipes keep the settings of FFCV's schedules."""

import pytest
import yaml
from conftest import ROOT

from nulsq.config import Recipe, flatten, load, load_recipe
from nulsq.data.transform import Transform
from nulsq.errors import InputError
from nulsq.quant.settings import FLOAT, Policy

RECIPES = ROOT / "configs/recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_sets_only_keys_that_differ_from_its_base_or_the_defaults(path):
    content = yaml.safe_load(path.read_text())
    base = content.pop("base", None)
    inherited = flatten(load(Recipe, path.parent / base if base else None))
    recipe = flatten(load(Recipe, path))
    assert not [key for key in flatten(content) if recipe[key] == inherited.get(key)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_first_and_last_layers_of_quantized_recipes_use_the_default_rule(path):
    quant = load_recipe(path).quant
    is_float = quant.weight.quantizer == quant.activation.quantizer == FLOAT
    assert quant.rules.keys() == {"edges"} and quant.rules["edges"].enabled == (not is_float)
    if not is_float:
        assert quant.rules["edges"] == Policy().rules["edges"]


# ---- FFCV's schedules: settings that differ from the defaults in the 24 files that rn18*.yaml replaced
# (whose initial steps were nmse's)

RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}  # epochs, as in FFCV
SHARED = {"run.precision": "bf16", "run.save_every": 500, "data.path": "data/imagenet", "data.batch": 1024,
          "data.holdout": "stratified:0.01", "data.workers": 8, "data.crop": "resized", "data.flip": True,
          "data.size": 192, "data.start_size": 160, "data.eval_size": 224, "data.eval_flip": True,
          "model.name": "torchvision:resnet18", "optim.weight_decay": 5e-5, "optim.label_smoothing": 0.1}
FLOAT_ONLY = {"quant.weight.quantizer": "fp", "quant.activation.quantizer": "fp", "quant.rules.edges.enabled": False,
              "optim.lr": 0.5, "optim.decay_norm_bias": False, "optim.schedule": "linear", "optim.warmup_epochs": 2.0,
              "optim.warmup_lr": 5e-5}
QUANTIZED = {"optim.lr": 0.08, "optim.warmup_epochs": 1.0}
OWN = {"rn18": FLOAT_ONLY, "rn18_w2a2": QUANTIZED, "rn18_w3a3": QUANTIZED | {"quant.bits": 3},
       "rn18_w4a4": QUANTIZED | {"quant.bits": 4}}
RENAMED = {"name", "run.train_id", "model.init_from", "data.ramp_start", "data.ramp_end"}  # compared separately


def size_by_epochs(epoch, first, last):
    """The size with a ramp in epochs, as in the former files: 160 px up to `first`, 192 from `last`, in steps of 32."""
    grown = min(max((epoch - first) / (last - first), 0), 1)
    return round((160 + grown * 32) / 32) * 32


@pytest.mark.parametrize("epochs", RAMPS)
@pytest.mark.parametrize("stem", OWN)
def test_each_imagenet_epoch_count_has_the_settings_of_its_former_file(stem, epochs):
    recipe = load_recipe(RECIPES / f"imagenet/{stem}.yaml", [f"optim.epochs={epochs}", f"run.train_id={epochs}"])
    former = flatten(Recipe()) | SHARED | OWN[stem] | {"optim.epochs": epochs}
    settings = flatten(recipe)
    assert {key for key in settings.keys() | former.keys() if settings.get(key) != former.get(key)} <= RENAMED
    data = recipe.data
    transform = Transform(0, data.crop, 0, data.flip, data.size, data.eval_ratio, data.start_size,
                          (data.ramp_start, data.ramp_end), epochs)
    sizes = [transform.size_at(epoch) for epoch in range(epochs)]
    assert sizes == [size_by_epochs(epoch, *RAMPS[epochs]) for epoch in range(epochs)]
    # The former names were imagenet-rn18_16_w2a2-0 and runs/imagenet-rn18_16-0.
    assert (recipe.name, recipe.run.train_id) == (f"imagenet-{stem}", str(epochs))
    assert recipe.model.init_from == (None if stem == "rn18" else f"runs/imagenet-rn18-{epochs}")


def test_default_imagenet_recipe_is_the_shortest_training():
    recipe = load_recipe(RECIPES / "imagenet/rn18_w2a2.yaml")
    assert (recipe.optim.epochs, recipe.model.init_from) == (16, "runs/imagenet-rn18-0")
    overridden = load_recipe(RECIPES / "imagenet/rn18_w2a2.yaml", ["model.init_from=elsewhere"])
    assert overridden.model.init_from == "elsewhere"


@pytest.mark.parametrize(("settings", "message"), [
    (["data.ramp_start=0.9"], "data.ramp_start = 0.9, allowed: at most data.ramp_end = 0.875"),
    (["data.ramp_start=65", "data.ramp_end=76"], "data.ramp_start = 65.0, allowed: at least 0 and at most 1"),
    (["data.ramp_end=-0.1"], "data.ramp_end = -0.1, allowed: at least 0 and at most 1"),
])
def test_ramp_start_and_end_must_be_ordered_shares_of_the_training(settings, message):
    with pytest.raises(InputError, match=message):
        load_recipe(RECIPES / "imagenet/rn18.yaml", settings)
