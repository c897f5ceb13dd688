"""Nearest-neighbour class accuracy: how far an encoder's features put like with like, without any training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def nearest_accuracy(features: Float[Tensor, "pictures width"], labels: Sequence[str]) -> float:
    """Share of pictures whose most similar other picture (cosine) is of their class; ties count by their share."""
    if len(features) != len(labels) or len(labels) < 2:
        raise ValueError(f"{len(features)} features and {len(labels)} labels; give as many, at least two")
    names = {name: number for number, name in enumerate(dict.fromkeys(labels))}
    classes = torch.tensor([names[label] for label in labels])
    unit = F.normalize(features.double(), dim=-1)
    similar = (unit @ unit.T).fill_diagonal_(-2.0)
    nearest = similar >= similar.max(dim=1, keepdim=True).values - 1e-12
    right = nearest & (classes[:, None] == classes[None, :])
    return float((right.sum(1) / nearest.sum(1)).mean())
