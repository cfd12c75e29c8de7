"""Starting weights from a file or a run directory, all of them or none: never half a model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from nulsq.errors import InputError, require
from nulsq.run import checkpoint

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")


def evaluated(content: dict) -> dict[str, Tensor]:
    """The state dict that a checkpoint's content stands for in evaluation: averages where the run kept them."""
    return content["model"] | (content.get("ema") or {})


def read_weights(source: str | Path, key: str = "model.init_from") -> dict[str, Tensor]:
    """The state dict in a .pth (plain, wrapped as `state_dict`, `module.`-prefixed), .safetensors or run directory.

    Of a run directory the best checkpoint is taken (last, where nothing was held out), as evaluation sees it. Nothing
    in the file is executed. Raises InputError, which names the setting `key`, for a file that is missing, damaged or
    holds no state dict.
    """
    path = Path(source)
    if path.is_dir():
        return evaluated(checkpoint.best_or_last(path))
    if not path.is_file():
        raise InputError(f"{key}: no file or run directory {path}")
    try:
        if path.suffix == ".safetensors":
            content = require("safetensors.torch", "train").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the readers raise whatever they come upon
        text = " ".join(str(error).split())[:160]
        raise InputError(f"{key}: {path} cannot be read as weights: {text}") from None
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        return evaluated(content)  # a checkpoint of a run
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{key}: {path} holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_weights_(model: nn.Module, source: str | Path, key: str = "model.init_from") -> None:
    """Load float weights into a float model, from a float network or from a quantized one of any bits.

    What the file holds below a convolution or linear layer, of which a float one has nothing, is that layer's
    quantizers and trackers: left out, quantizers are calibrated anew.

    Raises InputError listing missing, unexpected and misshapen keys; the model is then unchanged.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    wanted = model.state_dict()
    found = {name: value for name, value in read_weights(source, key).items()
             if name in wanted or not _below(layers, name)}
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
                 for name in found if name in wanted and found[name].shape != wanted[name].shape]
    if missing or unexpected or misshapen:
        parts = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
                 if names]
        raise InputError(f"{key}: {source} is of another architecture: {'; '.join(parts)}")
    model.load_state_dict(found, strict=False)


def _below(layers: set[str], name: str) -> bool:
    """Whether a state dict's key is of a module inside one of the layers."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts) - 1))
