"""InternViT for answering on a CPU: each block as few large operators over weights in oneDNN's own layout.

Equal to `InternViT`, whose weights it reads once, when it is made (tests/models/test_models_fused_vision.py).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from internvl.models.attention import attend
from internvl.models.internvit import Block, InternViT
from internvl.models.layers import Linear
from internvl.models.products import BlockedProduct


class FusedInternViT(InternViT):
    """Embeddings and norms are shared with the encoder it was made of; no gradients."""

    def __init__(self, vision: InternViT) -> None:
        nn.Module.__init__(self)
        self.config = vision.config
        self.checkpointing = False
        self.embeddings = vision.embeddings
        self.layers = nn.ModuleList(FusedBlock(block) for block in vision.layers if isinstance(block, Block))


class FusedBlock(nn.Module):
    """The scale of each branch lies in its last product, GELU and residuals are last steps of products."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, mlp = block.attention, block.mlp
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.heads, self.q_norm, self.k_norm = attention.heads, attention.q_norm, attention.k_norm
        self.qkv = _product(attention.qkv)
        self.proj = _product(attention.proj, block.scale1)
        self.fc1 = _product(mlp.fc1)
        self.fc2 = _product(mlp.fc2, block.scale2)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "tiles positions dim"]) -> Float[Tensor, "tiles positions dim"]:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        # Heads first in memory: products of strided heads are slower than the copies.
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous() for y in (self.q_norm(q), self.k_norm(k), v)
        )
        x = self.proj.plus(attend(q, k, v).transpose(1, 2).flatten(2), x)
        return self.fc2.plus(self.fc1.gelu(self.norm2(x)), x)


def _product(linear: Linear, scale: Tensor | None = None) -> BlockedProduct:
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if scale is not None:
        wide = scale.detach().float()
        weight = (weight.float() * wide[:, None]).to(weight.dtype)
        bias = None if bias is None else (bias.float() * wide).to(bias.dtype)
    return BlockedProduct(weight, bias)
