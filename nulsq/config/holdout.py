"""The grammar of `data.holdout`: which images of the training set selection sees and training does not.

    stratified:SHARE   that share of every class, 0 < SHARE < 1, drawn by data.holdout_seed
    last:N             the last N images, as the papers on CIFAR have it
    none               nothing
"""

import math
from dataclasses import dataclass
from typing import Literal

from nulsq.errors import InputError, did_you_mean

KINDS = ("stratified", "last", "none")


@dataclass(frozen=True)
class Holdout:
    """`share` is set for stratified, `count` for last."""

    kind: Literal["stratified", "last", "none"]
    share: float = 0.0
    count: int = 0


def parse_holdout(text: str) -> Holdout:
    """Read `data.holdout`. Spaces and every spelling of a number are allowed: `stratified:1e-1`, `last: 5`.

    Raises InputError for anything else. Whether the data set has enough images is checked by `nulsq.data.order.split`.
    """
    kind, colon, value = (part.strip() for part in text.partition(":"))
    try:
        if kind == "none" and not colon:
            return Holdout("none")
        if kind == "last" and (count := int(value)) > 0:
            return Holdout("last", count=count)
        if kind == "stratified" and 0 < (share := float(value)) < 1 and math.isfinite(share):
            return Holdout("stratified", share=share)
    except ValueError:
        pass
    hint = "" if kind in KINDS else did_you_mean(kind, KINDS)
    raise InputError(f"data.holdout = {text!r}.{hint} Allowed: stratified:SHARE with 0 < SHARE < 1, last:N with N > 0, "
                     "or none")
