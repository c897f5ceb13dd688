"""What data hands to training: one class a kind of batch, each field with its shape.

Tiles travel as uint8 (a quarter of the bytes) and are normalised where the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Bool, Float, Int, UInt8

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Company(NamedTuple):
    """What the ranks run at the same time, of which this batch is one part."""

    ranks: int = 0
    """0 where it is not known beforehand."""
    tokens: int = 0
    """Of all."""
    tiles: int = 0
    longest: int = 0
    """Tokens of the longest row: the others wait for it."""
    most_tiles: int = 0


@dataclass(frozen=True)
class ChatBatch:
    """Padded rows (`attention_mask` given) or one packed row (`segments` given)."""

    input_ids: Int[Tensor, "rows length"]
    labels: Int[Tensor, "rows length"]
    """Unshifted: the loss at position t reads the label at t + 1. IGNORE_INDEX where nothing is learned."""
    loss_weights: Float[Tensor, "rows length"]
    """Weight of each label, aligned with `labels`; 0 where the label is ignored."""
    position_ids: Int[Tensor, "rows length"]
    tiles: UInt8[Tensor, "tiles 3 side side"]
    attention_mask: Bool[Tensor, "rows length"] | None = None
    segments: Int[Tensor, "bounds"] | None = None
    """int32 boundaries of the samples in a packed row, from 0 to its length; `rows` is then 1."""
    num_samples: int = 0
    sources: tuple[str, ...] = ()
    """File and line of each sample, for messages."""
    room: int = 0
    """Tokens that a packed row may hold; 0 where there is no such limit."""
    company: Company = field(default_factory=Company)

    @property
    def num_tiles(self) -> int:
        return int(self.tiles.shape[0])

    @property
    def num_learned(self) -> int:
        """Positions with a label."""
        return int((self.labels != -100).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ChatBatch:
        import torch

        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> ChatBatch:
        import torch

        pinned: dict[str, Any] = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **pinned)
