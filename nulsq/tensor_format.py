"""Memory format and precision of a run: how its tensors lie in memory, and in which type it computes."""

import torch
from torch import nn


def memory_format(channels_last: bool) -> torch.memory_format:
    """The memory format of images [B, C, H, W] and convolution weights for `run.channels_last`."""
    return torch.channels_last if channels_last else torch.contiguous_format


def place(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move a model to a device, in place, its convolution weights in the memory format; returns the model."""
    return model.to(device).to(memory_format=memory_format(channels_last))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that the network runs in for `run.precision`, "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
