"""What a trial's network costs, before it is trained: bits and bytes follow from the recipe alone.

    average_bits   mean of the average weight bits and the average activation bits (see nulsq.cost)
    bytes          packed weights, other parameters and what the quantizers keep
"""

from nulsq.config import Recipe

KNOWN: dict[str, dict[str, float]] = {}  # what `tune.checks` has measured in another process is added


def network_cost(recipe: Recipe) -> dict[str, float]:
    """{"average_bits", "bytes"} of the recipe's network: one pass of one image.

    Recipes of the same network, bits and data share it. What is not known yet is measured here, with torch: in a
    search whose space has settings of the network.
    """
    same = repr((recipe.model, recipe.quant, recipe.data.path, recipe.data.size, recipe.data.eval_size))
    if same not in KNOWN:
        KNOWN[same] = _measure(recipe)
    return dict(KNOWN[same])


def _measure(recipe):
    import torch  # else the search's own process does without, see `tune.apart`

    from nulsq.cost import cost_of
    from nulsq.data import DataSet
    from nulsq.models.network import build_network
    from nulsq.quant.calibration.calibrate import calibrate_
    from nulsq.quant.projection import quantizers_of

    data = DataSet(recipe.data.path)
    size = data.manifest.size or recipe.data.eval_size or recipe.data.size
    model = build_network(recipe, len(data.classes), start=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(2, 3, size, size)
    if quantizers_of(model):
        calibrate_(model, [images])  # values do not matter here: shapes and bits are counted
    found = cost_of(model, images[:1])
    return {"average_bits": round((found.average_weight_bits + found.average_activation_bits) / 2, 3),
            "bytes": found.bytes}
