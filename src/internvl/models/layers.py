"""Small parts that every transformer here is made of. No attention, no architecture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

ONEDNN_MIN_NUMBERS = 20480
"""Below it torch does not give a 1x1 convolution to oneDNN."""


def onednn_is_faster(x: Tensor) -> bool:
    """float32 on two or more CPU threads, enough numbers: oneDNN reaches twice MKL's rate (benchmarks/vision.py).

    Measured on AMD; the only public way to oneDNN's float32 matrix product is a 1x1 convolution.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > ONEDNN_MIN_NUMBERS
        and torch.get_num_threads() > 1
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()
    )


def rows_by_matrix(
    x: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "new_dim part"],
    bias: Float[Tensor, "new_dim"] | None = None,
    groups: int = 1,
) -> Float[Tensor, "rows new_dim"]:
    """F.linear as a 1x1 convolution, without a copy of the rows; groups split the columns."""
    image = x[None, :, None].permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, :, None, None], bias, groups=groups)
    return out.permute(0, 2, 3, 1)[0, :, 0]


class Linear(nn.Linear):
    """nn.Linear, by oneDNN where that is faster."""

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch new_dim"]:
        if not onednn_is_faster(x):
            return super().forward(x)
        return rows_by_matrix(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the input (official InternRMSNorm)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class DropPath(nn.Module):
    """Drops a residual branch for whole samples and scales the kept ones (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate {rate} is outside [0, 1); lower it")
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        if not self.training or self.rate == 0.0:
            return x
        kept = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(kept) / kept


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def drop_path_rates(top: float, depth: int, schedule: str) -> list[float]:
    """Rate of each block: rising from 0 to `top` (linear), or `top` everywhere (uniform)."""
    if schedule == "uniform":
        return [top] * depth
    return [top * index / max(depth - 1, 1) for index in range(depth)]


def resize_positions(positions: Float[Tensor, "1 old width"], rows: int, columns: int) -> Float[Tensor, "1 new width"]:
    """Class position kept, patch positions of a square grid interpolated (bicubic, in float32) to another grid."""
    side = int((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    grid = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)


def rotary_angles(
    positions: Int[Tensor, " length"], head_width: int, base: float
) -> Float[Tensor, "length head_width"]:
    """Angle of each channel at each position, in float32; both halves of a head turn alike (LLaMA)."""
    steps = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angles = positions[:, None].float() / base**steps
    return torch.cat([angles, angles], dim=-1)


def rotate(
    x: Float[Tensor, "batch heads length head_width"], angles: Float[Tensor, "length head_width"]
) -> Float[Tensor, "batch heads length head_width"]:
    """Rotary position embedding in the layout of LLaMA: channel i turns with channel i + head_width / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(x.dtype)
