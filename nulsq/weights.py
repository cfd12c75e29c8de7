"""Starting weights from a file or a run directory, all of them or none: never half a model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from nulsq.errors import InputError, require

QUANTIZER_PARTS = (".weight_quantizer.", ".activation_quantizer.")
WRAPPERS = ("state_dict", "model", "model_state_dict", "net")


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """The state dict in a .pth (plain, wrapped as `state_dict`, `module.`-prefixed), .safetensors or run directory.

    Of a run directory the best checkpoint is taken (last, where nothing was held out). Nothing in the file is
    executed. Raises InputError for a file that is missing, damaged or holds no state dict.
    """
    path = Path(source)
    if path.is_dir():
        from nulsq.checkpoint import best_or_last
        return best_or_last(path)["model"]
    if not path.is_file():
        raise InputError(f"model.init_from: no file or run directory {path}")
    try:
        if path.suffix == ".safetensors":
            content = require("safetensors.torch", "train").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the readers raise whatever they come upon
        text = " ".join(str(error).split())[:160]
        raise InputError(f"model.init_from: {path} cannot be read as weights: {text}") from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"model.init_from: {path} holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_weights_(model: nn.Module, source: str | Path) -> None:
    """Load float weights into a float model. Quantizer parameters in the file are left out: they are calibrated anew.

    Raises InputError listing missing, unexpected and misshapen keys; the model is then unchanged.
    """
    found = {key: value for key, value in read_weights(source).items()
             if not any(part in f".{key}" for part in QUANTIZER_PARTS)}
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in wanted]
    misshapen = [f"{key} {tuple(found[key].shape)} for {tuple(wanted[key].shape)}"
                 for key in found if key in wanted and found[key].shape != wanted[key].shape]
    if missing or unexpected or misshapen:
        parts = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                 for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if keys]
        raise InputError(f"model.init_from: {source} is of another architecture: {'; '.join(parts)}")
    model.load_state_dict(found, strict=False)
