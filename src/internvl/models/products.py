"""A weight matrix as its product: plain, or in oneDNN's blocked layout. 4-bit blocks are four_bit.py's.

Which form decoding uses is decided in fused.py and choose.py; here is what each form can do.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FIXED_ROWS = 4
"""Rows that a product takes where a group must have one size; one row costs a tenth more in such a group."""


@runtime_checkable
class Product(Protocol):
    """x W^T + b, and the same added to something."""

    def __call__(self, x: Tensor) -> Tensor: ...
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

    def gelu(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x, self.weight, self.bias, "gelu", [], "none")
        return out

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.linear_with(x, other, self.weight, self.bias, "mul")
        return out

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.linear_with(x, other, self.weight, self.bias, "add")
        return out


class FixedRows:
    """Rows in groups of one size, the last one filled up: a row then has the same bits in any company."""

    def __init__(self, product: Product, rows: int = FIXED_ROWS) -> None:
        self.product, self.rows = product, rows

    def __call__(self, x: Tensor) -> Tensor:
        filled = F.pad(x, (0, 0, 0, -len(x) % self.rows))
        parts = [self.product(filled[start : start + self.rows]) for start in range(0, len(filled), self.rows)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(x)]

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


def ungrouped(product: Product) -> Product:
    """All rows at once."""
    return product.product if isinstance(product, FixedRows) else product


class SplitGate:
    """silu(x G^T) * (x U^T), the elementwise steps inside the products."""

    def __init__(self, gate: PlainProduct | BlockedProduct, up: PlainProduct | BlockedProduct) -> None:
        self.gate, self.up = gate, up

    def __call__(self, x: Tensor) -> Tensor:
        return self.up.times(x, self.gate.silu(x))


class JointGate:
    """The same from one product of both matrices."""

    def __init__(self, both: Product) -> None:
        self.both = both

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return F.silu(gate).mul_(up)


@torch.inference_mode()
def keeps_bits(product: Product, width: int) -> bool:
    """A row's product is the same, to the bit, alone and among others (bfloat16; found out by trying).

    Another order of a float32 sum shows in one of some thousand rounded results: this looks at 40,000 or more.
    """
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x[: 16 if product(x[:1]).shape[1] > 2500 else None]
    alone = torch.cat([product(row) for row in x.split(1)])
    return all(torch.equal(torch.cat([product(part) for part in x.split(group)]), alone) for group in (2, 4, 16))


def blocked_is_available(dtype: torch.dtype) -> bool:
    """oneDNN is built in and computes this dtype here."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_bfloat16() -> bool:
    """This CPU multiplies bfloat16 itself; elsewhere it is emulated, and slower than float32."""
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))
