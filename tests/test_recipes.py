"""The shipped recipes: each names only what differs from what it inherits, and FFCV's ladder keeps its settings."""

import pytest
import yaml
from conftest import ROOT

from nulsq.config import Recipe, flatten, load, load_recipe
from nulsq.quant.settings import FLOAT, Policy

RECIPES = ROOT / "configs/recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if not path.stem.startswith("rn18_"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_names_only_what_differs_from_its_base_or_the_defaults(path):
    content = yaml.safe_load(path.read_text())
    base = content.pop("base", None)
    inherited = flatten(load(Recipe, path.parent / base if base else None))
    recipe = flatten(load(Recipe, path))
    assert not [key for key in flatten(content) if recipe[key] == inherited.get(key)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_first_and_last_layers_of_quantized_recipes_follow_the_default_rule(path):
    quant = load_recipe(path).quant
    is_float = quant.weight.quantizer == quant.activation.quantizer == FLOAT
    assert quant.rules.keys() == {"edges"} and quant.rules["edges"].enabled == (not is_float)
    if not is_float:
        assert quant.rules["edges"] == Policy().rules["edges"]
