"""InternViT, 6B and 300M (paper 2.5, table 1), at any size whose sides are whole patches.

Weights come from `build.py` or `load.py`; pixel shuffle and projection are `connector.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internvl.config import VisionConfig
from internvl.models.attention import attend
from internvl.models.layers import MLP, DropPath, Linear, RMSNorm, drop_path_rates, resize_positions


def norm(config: VisionConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


class Embeddings(nn.Module):
    """Patches by a strided convolution, a class token first, learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_positions, config.width))
        self._resized: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, tiles: Float[Tensor, "tiles 3 height width"]) -> Float[Tensor, "tiles positions dim"]:
        height, width = tiles.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"tile of {width}x{height} pixels; both sides must be multiples of {self.patch_size}")
        patches = self.patch_embedding(tiles.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(tiles.shape[0], -1, -1).to(patches.dtype)
        positions = self.positions(height // self.patch_size, width // self.patch_size)
        return torch.cat([first, patches], dim=1) + positions

    def positions(self, rows: int, columns: int) -> Float[Tensor, "1 positions dim"]:
        """Positions for a grid; kept until the stored ones change, unless they are being learned."""
        stored = self.position_embedding
        if (stored.requires_grad and torch.is_grad_enabled()) or stored.is_inference():
            return resize_positions(stored, rows, columns)
        key = (rows, columns, stored.data_ptr(), stored._version, stored.dtype, stored.device)
        if self._resized is None or self._resized[0] != key:
            self._resized = (key, resize_positions(stored.detach(), rows, columns))
        return self._resized[1]


class Attention(nn.Module):
    """Full self-attention from one fused projection; queries and keys normed over all heads where asked (6B)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = Linear(config.width, config.width)

    def forward(self, x: Float[Tensor, "tiles positions dim"]) -> Float[Tensor, "tiles positions dim"]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        out: Tensor = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP, each branch scaled per channel."""

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = norm(config)
        self.attention = Attention(config)
        self.scale1 = nn.Parameter(config.scale_init * torch.ones(config.width))
        self.norm2 = norm(config)
        self.mlp = MLP(config.width, config.mlp_width)
        self.scale2 = nn.Parameter(config.scale_init * torch.ones(config.width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "tiles positions dim"]) -> Float[Tensor, "tiles positions dim"]:
        x = x + self.drop_path(self.scale1 * self.attention(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.scale2 * self.mlp(self.norm2(x)))
        return out


class InternViT(nn.Module):
    """Tiles to one vector a position, class token first; there is no final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        """Recompute blocks in the backward pass instead of keeping their activations."""
        rates = drop_path_rates(config.drop_path, config.depth, config.drop_path_schedule)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)

    def forward(
        self,
        tiles: Float[Tensor, "tiles 3 height width"],
        feature_layer: int = -1,
        kept: Int[Tensor, "tiles kept"] | None = None,
    ) -> Float[Tensor, "tiles positions dim"]:
        """Output of the tapped block: an index into [embeddings, block 1, ...]. Later blocks do not run.

        With `kept` only the class token and these patches of each tile are seen (masking as in FLIP, arXiv 2212.00794).
        """
        x: Tensor = self.embeddings(tiles)
        if kept is not None:
            x = torch.cat([x[:, :1], x[:, 1:].take_along_dim(kept[:, :, None], dim=1)], dim=1)
        for index in range(self.num_blocks(feature_layer)):
            x = self._block(index, x)
        return x

    def hidden_states(self, tiles: Float[Tensor, "tiles 3 height width"]) -> list[Float[Tensor, "tiles positions dim"]]:
        """Embeddings, then the output of every block."""
        states: list[Tensor] = [self.embeddings(tiles)]
        for index in range(len(self.layers)):
            states.append(self._block(index, states[-1]))
        return states

    def taps(
        self, tiles: Float[Tensor, "tiles 3 height width"], feature_layers: Sequence[int]
    ) -> list[Float[Tensor, "tiles positions dim"]]:
        """The outputs of several blocks, indices as in `forward`; the others are not kept."""
        wanted = [self.num_blocks(layer) for layer in feature_layers]
        x: Tensor = self.embeddings(tiles)
        found = {0: x} if 0 in wanted else {}
        for index in range(max(wanted)):
            x = self._block(index, x)
            if index + 1 in wanted:
                found[index + 1] = x
        return [found[number] for number in wanted]

    def num_blocks(self, feature_layer: int) -> int:
        """Blocks to run for a tap; ValueError where there is no such layer."""
        num_states = len(self.layers) + 1
        if not -num_states <= feature_layer < num_states:
            raise ValueError(
                f"feature layer {feature_layer} of a model of {len(self.layers)} blocks; "
                f"it must be in [{-num_states}, {num_states - 1}]"
            )
        return feature_layer % num_states

    def set_drop_path(self, top: float, schedule: str) -> None:
        """Other rates for a run; they are no part of the weights, and the config stays."""
        for block, rate in zip(self.layers, drop_path_rates(top, len(self.layers), schedule), strict=True):
            block.drop_path = DropPath(rate)

    @torch.no_grad()
    def resize_positions(self, image_size: int) -> None:
        """Replace the stored positions by those of another image size, for good."""
        self.config = replace(self.config, image_size=image_size)
        stored, side = self.embeddings.position_embedding, self.config.grid
        self.embeddings.position_embedding = nn.Parameter(resize_positions(stored, side, side), stored.requires_grad)

    def _block(self, index: int, x: Tensor) -> Tensor:
        block = self.layers[index]
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, use_reentrant=False)
        else:
            out = block(x)
        return out
