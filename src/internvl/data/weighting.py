"""Loss weights of labels by token, sample or square root of the sample (spec 6.4; official len2weight)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.tokens import IGNORE_INDEX

Weighting = Literal["token", "sample", "square"]


def weight_of(num_learned: int, weighting: Weighting) -> float:
    """Weight of each learned token of a sample that has `num_learned`; 0 where there is none."""
    if num_learned == 0:
        return 0.0
    if weighting == "token":
        return 1.0
    if weighting == "sample":
        return 1 / num_learned
    if weighting == "square":
        return float(1 / num_learned**0.5)
    raise ValueError(f"unknown weighting {weighting!r}; it is one of token, sample, square")


def weigh(labels: Int[Tensor, " length"], weighting: Weighting = "token") -> Float[Tensor, " length"]:
    """The weight of each label of one sample."""
    learned = labels != IGNORE_INDEX
    return learned.to(torch.float32).mul_(weight_of(int(learned.sum()), weighting))
