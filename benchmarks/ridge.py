"""Least squares from features of pictures to vectors of texts: what frozen features say of names, without training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Ridge:
    """Least squares with a penalty, on standardised features and centred targets."""

    def __init__(self, features: Tensor, targets: Tensor, strength: float) -> None:
        self.mean, self.spread, self.centre = features.mean(0), features.std(0) + 1e-6, targets.mean(0)
        x = self.standard(features).double()
        penalty = strength * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (targets - self.centre).double()).float()

    def standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.spread

    def pictures(self, features: Tensor) -> Tensor:
        """Unit vectors of pictures, in the space of the texts."""
        return F.normalize(self.standard(features) @ self.weight, dim=-1)

    def texts(self, targets: Tensor) -> Tensor:
        """Unit vectors of texts, centred as in the fit."""
        return F.normalize(targets - self.centre, dim=-1)
