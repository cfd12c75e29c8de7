"""The grammar of `data.holdout`: which training images are held out, for selection to see and training to leave out.

    stratified:SHARE   that share of every class, 0 < SHARE < 1, drawn with data.holdout_seed
    last:N             the last N images, as in the papers on CIFAR
    none               no images
"""

import math
from dataclasses import dataclass
from typing import Literal

from nulsq.errors import InputError, did_you_mean

FORMS = ("stratified", "last", "none")
ALLOWED = "stratified:SHARE with 0 < SHARE < 1, last:N with 0 < N < the number of training images, or none"


@dataclass(frozen=True)
class Holdout:
    """`share` belongs to stratified, `count` to last."""

    form: Literal["stratified", "last", "none"]
    share: float = 0.0
    count: int = 0


def parse_holdout(text: str) -> Holdout:
    """Read `data.holdout`. Spaces and every spelling of a number are allowed: `stratified:1e-1`, `last: 5`.

    Raises InputError for anything else. `nulsq.data.order.split` checks whether the data set has enough images.
    """
    form, colon, value = (part.strip() for part in text.partition(":"))
    try:
        if form == "none" and not colon:
            return Holdout("none")
        if form == "last" and (count := int(value)) > 0:
            return Holdout("last", count=count)
        if form == "stratified" and 0 < (share := float(value)) < 1 and math.isfinite(share):
            return Holdout("stratified", share=share)
    except ValueError:
        pass
    hint = "" if form in FORMS else did_you_mean(form, FORMS, cutoff=0.6)
    raise InputError(f"data.holdout = {text!r}.{hint} Allowed: {ALLOWED}")
