"""Heads on features: linear and attention probes, segmentation heads and the feature pyramid. No backbone, no losses.

Batch normalisation is torch's: `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes it the papers' on several devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PROBE_EPS = 1e-6  # official classification/models/intern_vit_6b.py
PROBE_INIT_STD = 0.01  # same file
POOL_SCALES = (1, 2, 3, 6)  # UperNet paper, section 3; official segmentation/configs
HEAD_DROPOUT = 0.1  # same configs


class LinearProbe(nn.Module):
    """Batch norm and one linear layer on a vector a picture (official linear probing; InternVL paper, section 4.2)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=PROBE_EPS)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=PROBE_INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Float[Tensor, "pictures dim"]) -> Float[Tensor, "pictures classes"]:
        out: Tensor = self.head(self.norm(features))
        return out


class AttentionProbe(nn.Module):
    """One learned query looks at all tokens; then batch norm and a linear layer."""

    def __init__(self, dim: int, num_classes: int, num_heads: int = 8) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the width {dim}; choose a divisor")
        self.num_heads = num_heads
        self.norm_tokens = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.zeros(dim))
        self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.probe = LinearProbe(dim, num_classes)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Float[Tensor, "pictures tokens dim"]) -> Float[Tensor, "pictures classes"]:
        x = self.norm_tokens(tokens)
        query = self._heads(self.query.expand(len(x), 1, -1))
        pooled = F.scaled_dot_product_attention(query, self._heads(self.key(x)), self._heads(self.value(x)))
        out: Tensor = self.probe(self.out(pooled.flatten(1)))
        return out

    def _heads(self, x: Float[Tensor, "pictures tokens dim"]) -> Float[Tensor, "pictures heads tokens head_dim"]:
        out: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return out


def probe_feature(
    tokens: Float[Tensor, "pictures tokens dim"],
) -> Float[Tensor, "pictures double_dim"]:
    """Class token beside the mean of the patches: what the official linear probe looks at. The class token is first."""
    return torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), dim=1)


def feature_map(
    tokens: Float[Tensor, "pictures tokens dim"], rows: int, columns: int
) -> Float[Tensor, "pictures dim rows columns"]:
    """Patch tokens (class token left out) as a picture."""
    if tokens.shape[1] != rows * columns:
        raise ValueError(f"{tokens.shape[1]} tokens for {rows} x {columns} patches; leave the class token out")
    out: Tensor = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return out


class LinearSegmenter(nn.Module):
    """Batch norm and a 1 x 1 convolution on one feature map: the head of the linear probe and of few-shot tuning."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.head = nn.Conv2d(dim, num_classes, 1)

    def forward(
        self, maps: Sequence[Float[Tensor, "pictures dim rows columns"]]
    ) -> Float[Tensor, "pictures classes rows columns"]:
        out: Tensor = self.head(self.norm(maps[-1]))
        return out


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of each place."""

    def forward(self, x: Float[Tensor, "pictures dim rows columns"]) -> Float[Tensor, "pictures dim rows columns"]:
        out: Tensor = super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return out


class FeaturePyramid(nn.Module):
    """Four maps of a plain ViT, all at one size, to 4, 2, 1 and 1/2 times it (official intern_vit_6b.py, `up1..4`)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), LayerNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.up3 = nn.Identity()
        self.up4 = nn.MaxPool2d(2, 2)

    def forward(self, maps: Sequence[Float[Tensor, "pictures dim _ _"]]) -> list[Float[Tensor, "pictures dim _ _"]]:
        if len(maps) != 4:
            raise ValueError(f"{len(maps)} feature maps; the pyramid takes 4, from shallow to deep")
        scales = (self.up1, self.up2, self.up3, self.up4)
        return [scale(x) for scale, x in zip(scales, maps, strict=True)]


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, dim: int, new_dim: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(dim, new_dim, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(new_dim), nn.ReLU()
        )


class UperNet(nn.Module):
    """Pyramid pooling on the deepest map, top-down sums, all fused at the finest scale (Xiao et al. 2018, figure 4)."""

    def __init__(self, dims: Sequence[int], width: int, num_classes: int, dropout: float = HEAD_DROPOUT) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvBlock(dims[-1], width, 1)) for size in POOL_SCALES
        )
        self.bottleneck = ConvBlock(dims[-1] + len(POOL_SCALES) * width, width, 3)
        self.laterals = nn.ModuleList(ConvBlock(dim, width, 1) for dim in dims[:-1])
        self.smooths = nn.ModuleList(ConvBlock(width, width, 3) for _ in dims[:-1])
        self.fuse = ConvBlock(len(dims) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(
        self, maps: Sequence[Float[Tensor, "pictures _ _ _"]]
    ) -> Float[Tensor, "pictures classes rows columns"]:
        if len(maps) != len(self.laterals) + 1:
            raise ValueError(f"{len(maps)} feature maps; this head was built for {len(self.laterals) + 1}")
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps[:-1], strict=True)]
        levels.append(self._pooled(maps[-1]))
        for finer in range(len(levels) - 2, -1, -1):
            levels[finer] = levels[finer] + resize(levels[finer + 1], levels[finer])
        smooth = [conv(x) for conv, x in zip(self.smooths, levels[:-1], strict=True)] + levels[-1:]
        fused = self.fuse(torch.cat([resize(x, smooth[0]) for x in smooth], dim=1))
        out: Tensor = self.head(self.dropout(fused))
        return out

    def _pooled(self, x: Float[Tensor, "pictures dim rows columns"]) -> Float[Tensor, "pictures width rows columns"]:
        out: Tensor = self.bottleneck(torch.cat([x, *(resize(pool(x), x) for pool in self.pools)], dim=1))
        return out


class AuxiliarySegmenter(nn.Module):
    """A 3 x 3 convolution and a classifier on one of the maps; its loss counts 0.4 (official segmentation/configs)."""

    def __init__(self, dim: int, width: int, num_classes: int, index: int = 1, dropout: float = HEAD_DROPOUT) -> None:
        super().__init__()
        self.index = index
        self.conv = ConvBlock(dim, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(
        self, maps: Sequence[Float[Tensor, "pictures _ _ _"]]
    ) -> Float[Tensor, "pictures classes rows columns"]:
        out: Tensor = self.head(self.dropout(self.conv(maps[self.index])))
        return out


def resize(x: Float[Tensor, "pictures dim _ _"], like: Tensor) -> Float[Tensor, "pictures dim rows columns"]:
    """Bilinear, to the rows and columns of `like`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
