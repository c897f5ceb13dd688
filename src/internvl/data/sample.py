"""What encoding a record makes: ids, labels and tiles, or their numbers alone."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Int64, UInt8
from torch import Tensor

from internvl.data.splitting import Segment
from internvl.tokens import IGNORE_INDEX


class Sample(NamedTuple):
    """An encoded record."""

    input_ids: Int64[Tensor, " length"]
    labels: Int64[Tensor, " length"]
    tiles: UInt8[Tensor, "tiles 3 side side"]
    source: str = ""
    num_cut: int = 0
    """Tokens that did not fit and were cut off the end."""

    @property
    def num_tiles(self) -> int:
        return int(self.tiles.shape[0])

    @property
    def num_learned(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    def part(self, segment: Segment) -> Sample:
        """The tokens and tiles of a segment; its first token is not learned, for nothing in the row predicts it."""
        end, last_tile = segment.start + segment.tokens, segment.first_tile + segment.tiles
        labels = self.labels[segment.start : end].clone()
        labels[0] = IGNORE_INDEX
        tiles = self.tiles[segment.first_tile : last_tile]
        return Sample(self.input_ids[segment.start : end], labels, tiles, self.source, self.num_cut)


class Prompt(NamedTuple):
    """An encoded conversation, open for an answer."""

    input_ids: Int64[Tensor, " length"]
    tiles: UInt8[Tensor, "tiles 3 side side"]


class Counts(NamedTuple):
    tokens: int
    tiles: int


class Outline(NamedTuple):
    """What `encode` makes of a record, from its text and the headers of its media alone."""

    tokens: int
    """Before anything is cut."""
    tiles: int
    learned: int
    num_cut: int
