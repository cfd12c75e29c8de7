"""Exact counters of loss and accuracy, kept on the device until they are read, and summed over the ranks."""

import torch
from torch import Tensor

from nulsq.distributed import Ranks


class Counters:
    """Sums over images: loss, top-1 and top-5 hits, number of images. Adding does not synchronize with the device.

    All are in one float64 tensor: counts are exact up to 2^53, and the ranks are summed in one collective call.
    """

    def __init__(self, device: torch.device):
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add a batch: logits [B, classes], labels [B], and its mean loss []."""
        hits = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.values += torch.stack([loss.detach().double() * len(labels), hits[:, 0].sum().double(),
                                    hits.sum().double(), torch.full_like(self.values[0], len(labels))])

    def reset(self) -> None:
        self.values.zero_()

    def read(self, ranks: Ranks, prefix: str) -> dict[str, float]:
        """Mean loss and accuracies in percent over all ranks. A collective call; synchronizes."""
        loss, top1, top5, count = ranks.sum_(self.values.clone()).tolist()
        count = max(count, 1)
        return {f"{prefix}_loss": loss / count, f"{prefix}_top1": 100 * top1 / count,
                f"{prefix}_top5": 100 * top5 / count, f"{prefix}_images": int(count)}
