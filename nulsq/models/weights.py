"""Starting weights from a file or a run directory: all of them, or an error. Never half a model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nulsq.errors import InputError, require
from nulsq.run import checkpoint

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")  # keys that other tools store a state dict under


def evaluated_state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict that evaluation uses of a checkpoint's content: averaged weights where the run kept them."""
    return content["model"] | (content.get("ema") or {})


def read_weights(source: str | Path, setting: str = "model.init_from") -> dict[str, Tensor]:
    """Read a state dict from a .pth (plain, wrapped, `module.`-prefixed), a .safetensors file or a run directory.

    Of a run directory: the best checkpoint (the last one, where nothing was held out), as evaluation uses it. Nothing
    in the file is executed. Raises InputError, which names `setting`, for a file that is missing, damaged or holds no
    state dict.
    """
    path = Path(source)
    if path.is_dir():
        return evaluated_state_dict(checkpoint.load_chosen(path))
    if not path.is_file():
        raise InputError(f"{setting}: no file or run directory {path}")
    try:
        if path.suffix == ".safetensors":
            content = require("safetensors.torch", "train").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the readers raise any exception
        text = " ".join(str(error).split())[:160]
        raise InputError(f"{setting}: {path} cannot be read as weights: {text}") from None
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        return evaluated_state_dict(content)  # a checkpoint of a run
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{setting}: {path} holds no state dict of tensors")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_weights_(model: nn.Module, source: str | Path, setting: str = "model.init_from") -> None:
    """Load weights into a float model, from a float network or from a quantized one of any bits.

    Keys below a convolution or linear layer, which a float layer does not have, belong to quantizers and trackers: they
    are left out, and the quantizers are calibrated again.

    Raises InputError that lists missing, unexpected and misshapen keys; the model is then unchanged.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    own = model.state_dict()
    weights = {name: value for name, value in read_weights(source, setting).items()
               if name in own or not _is_inside(layers, name)}
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    misshapen = [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
                 for name in weights if name in own and weights[name].shape != own[name].shape]
    if missing or unexpected or misshapen:
        problems = [f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                    for problem, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
                    if names]
        raise InputError(f"{setting}: {source} is of another architecture: {'; '.join(problems)}")
    model.load_state_dict(weights, strict=False)


def _is_inside(layers: set[str], name: str) -> bool:
    """Whether a state dict's key belongs to a module inside one of the layers."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts) - 1))
