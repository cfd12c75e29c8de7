"""Checks of a recipe that need neither data nor torch: names, and combinations of settings."""

from nulsq.config.flat import flatten
from nulsq.config.holdout import parse_holdout
from nulsq.config.recipe import Distill, Recipe
from nulsq.errors import InputError, did_you_mean
from nulsq.quant.registry import available, get_quantizer
from nulsq.quant.settings import FLOAT, GRAD_SCALES, INITIALIZERS, NORMALIZATIONS, OLD_INITIALIZERS, PRESETS, STE_RULES


def check_recipe(recipe: Recipe) -> None:
    """Check the names of quantizers, initializers and the like, and settings that contradict each other.

    Raises InputError that names the keys. Reads nothing from disk, except to import a quantizer that is no built-in.
    """
    allowed = {"init": (*INITIALIZERS, *OLD_INITIALIZERS), "grad_scale": GRAD_SCALES, "ste": STE_RULES,
               "preset": PRESETS, "normalization": NORMALIZATIONS}
    for key, value in flatten(recipe.quant, "quant").items():
        name = key.rpartition(".")[2]
        if value is None or ".options" in key:
            continue
        if name == "quantizer":
            if value in (FLOAT, *available()):
                continue  # get_quantizer would import torch
            try:
                get_quantizer(value)
            except ValueError as error:
                raise InputError(f"{key}: {error}") from None
        elif name in allowed and value not in allowed[name]:
            hint = did_you_mean(value, allowed[name])
            raise InputError(f"{key} = {value!r}.{hint} Allowed: {', '.join(allowed[name])}")
    if recipe.data.ramp_start > recipe.data.ramp_end:
        raise InputError(f"data.ramp_start = {recipe.data.ramp_start}, allowed: at most data.ramp_end = "
                         f"{recipe.data.ramp_end}")
    optim = recipe.optim
    if optim.nesterov and optim.optimizer == "sgd" and not optim.momentum > 0:
        raise InputError("optim.nesterov = true needs optim.momentum above 0")
    if optim.warmup_epochs >= optim.epochs:
        raise InputError(f"optim.warmup_epochs = {optim.warmup_epochs}, allowed: below optim.epochs = {optim.epochs}")
    if optim.freeze_bn and optim.reestimate_bn:
        raise InputError("optim.freeze_bn keeps the batch-norm statistics and optim.reestimate_bn recomputes them: set "
                         "one of the two")
    if recipe.distill.weights and (recipe.distill.teacher is None or ":" not in recipe.distill.teacher):
        raise InputError("distill.weights needs distill.teacher = LIBRARY:NAME, the network that the weights belong to")
    if recipe.distill.teacher is None and recipe.distill != Distill():
        raise InputError("the distill settings have no effect without distill.teacher")
    if recipe.distill.teacher and recipe.distill.weight == 1 and optim.label_smoothing:
        raise InputError("optim.label_smoothing has no effect with distill.weight = 1: the loss has no labels then")
    try:
        recipe.quant.without_preset()
        recipe.oscillation.check()
    except ValueError as error:
        raise InputError(str(error)) from None
    parse_holdout(recipe.data.holdout)
