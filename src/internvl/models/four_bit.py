"""A weight matrix as 4-bit blocks of 32 weights with scale and minimum, as in GGUF's Q4_1.

Blocks are fitted, and what they miss is kept beside them where it is of low rank: a merged adapter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

GROUP = 32
"""Weights that share a scale and a minimum."""
LEVELS = 15
MIDDLE = 8
"""The kernel computes (level - 8) * scale + zero."""
ROWS_MULTIPLE = 64
"""Output rows that the kernel takes together."""
FIT_ROUNDS = 4
SMALLEST_SCALE = 1e-30
MAX_RANK = 64
OVER_NOISE = 2.5
"""Singular values above this many times the smallest one looked at are a change of the weights, not rounding."""


class FourBitProduct:
    """A copy of 4-bit blocks, and what they miss where that is of low rank; x is bfloat16.

    A merged adapter changes weights by less than half a level: rounding alone would take it back. Its two factors are
    4-bit blocks too: the narrow one makes a few more inputs, the wide one is their columns of the matrix.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> None:
        self.rows, self.rank = weight.shape[0], 0
        exact = weight.detach().float()
        factors = low_rank(exact - unpack(*quantise(exact)))
        if factors is not None:
            up, down = (unpack(*quantise(factor)) for factor in factors)
            self.rank = len(down)
            exact = torch.cat([exact - up @ down, up], 1)
            self.down = _packed(down)
        self.blocks = _packed(exact)
        self.bias = bias
        self.product = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        if self.rank:
            x = torch.cat([x, self.product(x, self.down[0], GROUP, self.down[1])[:, : self.rank]], 1)
        out: Tensor = self.product(x, self.blocks[0], GROUP, self.blocks[1])
        if out.shape[1] != self.rows:
            out = out[:, : self.rows]
        return out if self.bias is None else out + self.bias

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


def _packed(weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
    """As the kernel takes it."""
    levels, scale_and_zero = quantise(F.pad(weight, (0, 0, 0, -len(weight) % ROWS_MULTIPLE)))
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2), scale_and_zero


def quantise(weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
    """Levels 0..15 (int32) and, for every group, scale and zero (bfloat16) so that w = (level - 8) scale + zero.

    From the extremes of a group, then a few rounds of least squares for scale and zero; the best round counts.
    Weights that were such blocks before come back as they were (KL to the unrounded model: docs/chat.md).
    """
    out, width = weight.shape
    if width % GROUP:
        raise ValueError(f"a matrix of width {width}: 4-bit weights need a multiple of {GROUP}; use dtype bfloat16")
    groups = weight.float().view(out, width // GROUP, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale, mean = (high - low) / LEVELS, groups.mean(-1, keepdim=True)
    zero = low + MIDDLE * scale
    best: tuple[Tensor, ...] = ()
    for _ in range(FIT_ROUNDS):
        # What the kernel multiplies with: levels make up for the rounding of scale and zero.
        scale, zero = scale.bfloat16().float().clamp_(min=SMALLEST_SCALE), zero.bfloat16().float()
        levels = ((groups - zero) / scale).round_().clamp_(-MIDDLE, LEVELS - MIDDLE)
        error = torch.addcmul(zero, levels, scale).sub_(groups).square_().sum(-1, keepdim=True)
        now = (error, levels, scale, zero)
        best = (
            tuple(torch.where(error < best[0], new, old) for new, old in zip(now, best, strict=True)) if best else now
        )
        around = levels - levels.mean(-1, keepdim=True)
        spread = around.square().sum(-1, keepdim=True).clamp_(min=SMALLEST_SCALE)
        scale = (around * groups).sum(-1, keepdim=True) / spread
        zero = mean - scale * levels.mean(-1, keepdim=True)
    _, levels, scale, zero = best
    stacked = torch.stack([scale.squeeze(-1).t(), zero.squeeze(-1).t()], -1)
    return levels.add_(MIDDLE).view(out, width).int(), stacked.bfloat16().contiguous()


def unpack(levels: Tensor, scale_and_zero: Tensor) -> Float[Tensor, "out in"]:
    """The weights that levels, scale and zero stand for."""
    scale, zero = (part.float().t()[..., None] for part in scale_and_zero.unbind(-1))
    groups = levels.view(len(levels), -1, GROUP) - MIDDLE
    return torch.addcmul(zero, groups.float(), scale).reshape(levels.shape)


def low_rank(residue: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
    """The part of a rounding error that stands out of its noise, as two factors; None where it is all noise."""
    asked = min(MAX_RANK, min(residue.shape) // 4) // GROUP * GROUP  # noise alone keeps within the factor up to there
    if not asked:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(residue, q=asked, niter=1)
    rank = int((sizes > OVER_NOISE * sizes[-1]).sum())
    if rank == 0:
        return None
    rank = min(-(-rank // GROUP) * GROUP, asked)
    # The sizes go with the rows of the second factor: a group of its blocks then has one size.
    return left[:, :rank].contiguous(), (right[:, :rank] * sizes[:rank]).t().contiguous()
