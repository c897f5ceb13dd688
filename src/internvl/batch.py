"""What data hands to training: one class a kind of batch, each field with its shape.

Tiles travel as uint8 (a quarter of the bytes) and are normalised where the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True)
class Texts:
    """Ids and where they are real; padding on the right."""

    ids: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length"] | Int[Tensor, "rows length"]

    def rows(self, index: Tensor) -> Texts:
        return Texts(self.ids[index], self.mask[index])

    def longer_than(self, num_tokens: int) -> Bool[Tensor, " rows"]:
        """False for texts with nothing but the tokens that every text has."""
        return self.mask.sum(1) > num_tokens


@dataclass(frozen=True)
class TextBatch:
    """Texts in any language, each with an English one that means the same."""

    texts: Texts
    """`summarize:` and the text."""
    english: Int[Tensor, " texts"]
    """Number of each text's English one among those that its loader names."""
    translated: Bool[Tensor, " texts"]
    """False for a text that is its own English one."""
    sources: tuple[str, ...] = ()
    """File and line of each text, for messages."""

    @property
    def num_texts(self) -> int:
        return int(self.english.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        return self._moved(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TextBatch:
        return self._moved(lambda value: value.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> TextBatch:
        texts = Texts(move(self.texts.ids), move(self.texts.mask))
        return replace(self, texts=texts, english=move(self.english), translated=move(self.translated))


@dataclass(frozen=True)
class PairBatch:
    """Pictures, each with a text in the forms that a stage asks for."""

    pixels: UInt8[Tensor, "seen 3 side side"]
    """Of every picture; where features are kept, of those that are not kept yet."""
    contrast: Texts
    """`summarize:` and the text."""
    same: Int[Tensor, " pairs"]
    """Equal for pairs of one picture or one text of this batch (`image_text.alike`): no negatives of each other."""
    valid: Bool[Tensor, " pairs"]
    """False for a pair that stands in for one that could not be read: it counts in no loss."""
    kept: Int[Tensor, "pairs kept"] | None = None
    """Patches that the vision encoder sees of each picture; all where not given."""
    match: Texts | None = None
    """The text alone."""
    negatives: Texts | None = None
    """A text of another picture."""
    caption: Texts | None = None
    """The prompt and the text."""
    labels: Int[Tensor, "pairs length"] | None = None
    """Of the captions, unshifted; IGNORE_INDEX where nothing is learned."""
    names: tuple[bytes, ...] = ()
    """Name of each picture, where features are kept."""
    fresh: tuple[bytes, ...] = ()
    """Names of `pixels`, where features are kept."""
    sources: tuple[str, ...] = ()
    """File and line of each pair, for messages."""
    reading: Int[Tensor, " pairs"] | None = None
    """Equal where texts are, on any rank."""
    place: int = 0
    """Pairs of all ranks before this joint batch: what is drawn about it follows from it, on any number of ranks."""

    @property
    def num_pairs(self) -> int:
        return int(self.valid.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        return self._moved(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairBatch:
        return self._moved(lambda value: value.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PairBatch:
        import torch

        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                moved[f.name] = move(value)
            elif isinstance(value, Texts):
                moved[f.name] = Texts(move(value.ids), move(value.mask))
        return replace(self, **moved)
