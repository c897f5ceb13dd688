"""A weight matrix as its product: plain, in oneDNN's blocked layout, or as 4-bit blocks.

Which form decoding uses is decided in fused.py; here is what each form can do.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

GROUP = 32
"""Weights that share a scale and a minimum, as in GGUF's Q4_1."""
LEVELS = 15
MIDDLE = 8
"""The kernel computes (q - 8) * scale + zero."""
FIXED_ROWS = 4
"""Rows that a product takes where a group must have one size; one row costs a tenth more in such a group."""
FIT_ROUNDS = 4
SMALLEST_SCALE = 1e-30
ROWS_MULTIPLE = 64
"""Output rows that the 4-bit kernel takes together."""


@runtime_checkable
class Product(Protocol):
    """x W^T + b, and the three forms in which it is followed by one elementwise step."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def silu(self, x: Tensor) -> Tensor: ...
    def times(self, x: Tensor, other: Tensor) -> Tensor: ...
    def plus(self, x: Tensor, other: Tensor) -> Tensor: ...


class PlainProduct:
    """The matrix as it is: any device, any dtype, no copy."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


class BlockedProduct:
    """A copy in oneDNN's own layout: twice the speed of the plain matrix on a few rows, and fused last steps."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = bias
        self.linear = torch.ops.mkldnn._linear_pointwise.default
        self.linear_with = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x, self.weight, self.bias, "none", [], "")
        return out

    def silu(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x, self.weight, self.bias, "swish", [], "")
        return out

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.linear_with(x, other, self.weight, self.bias, "mul")
        return out

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.linear_with(x, other, self.weight, self.bias, "add")
        return out


class FourBitProduct:
    """A copy of 4-bit blocks; x is bfloat16."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Tensor | None = None) -> None:
        self.rows = weight.shape[0]
        padded = F.pad(weight.detach(), (0, 0, 0, -self.rows % ROWS_MULTIPLE))
        levels, scale_and_zero = quantise(padded)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2)
        self.scale_and_zero = scale_and_zero
        self.bias = bias
        self.product = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x, self.weight, GROUP, self.scale_and_zero)
        if out.shape[1] != self.rows:
            out = out[:, : self.rows]
        return out if self.bias is None else out + self.bias

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


class FixedRows:
    """Rows in groups of one size, the last one filled up: a row then has the same bits in any company."""

    def __init__(self, product: Product, rows: int = FIXED_ROWS) -> None:
        self.product, self.rows = product, rows

    def __call__(self, x: Tensor) -> Tensor:
        filled = F.pad(x, (0, 0, 0, -len(x) % self.rows))
        parts = [self.product(filled[start : start + self.rows]) for start in range(0, len(filled), self.rows)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x)]

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(self(x), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


@torch.inference_mode()
def keeps_bits(product: Product, width: int) -> bool:
    """A row's product is the same, to the bit, alone and among others (bfloat16; found out by trying).

    Another order of a float32 sum shows in one of some thousand rounded results: this looks at 40,000 or more.
    """
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x[: 16 if product(x[:1]).shape[1] > 2500 else None]
    alone = torch.cat([product(row) for row in x.split(1)])
    return all(torch.equal(torch.cat([product(part) for part in x.split(group)]), alone) for group in (2, 4, 16))


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


def blocked_is_available(dtype: torch.dtype) -> bool:
    """oneDNN is built in and computes this dtype here."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_bfloat16() -> bool:
    """This CPU multiplies bfloat16 itself; elsewhere it is emulated, and slower than float32."""
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))
