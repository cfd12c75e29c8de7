"""Recipes: the settings (recipe.py), reading them from YAML and overrides (load.py), checking them (checks.py)."""

from nulsq.config.checks import check_recipe
from nulsq.config.flat import differences, flatten
from nulsq.config.load import describe, load, load_recipe, resolved, to_yaml
from nulsq.config.recipe import Data, Distill, Guard, Model, Optim, Quant, Recipe, Run, setting

__all__ = ["Data", "Distill", "Guard", "Model", "Optim", "Quant", "Recipe", "Run", "check_recipe", "describe",
           "differences", "flatten", "load", "load_recipe", "resolved", "setting", "to_yaml"]
