"""Which samples share a batch, from their numbers of tokens and tiles alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from internvl.data.packing import Packing, Room
from internvl.data.weighting import Weighting


@dataclass(frozen=True)
class BatchSettings:
    """How samples share a batch. Where only `samples` is set, nothing is measured beforehand."""

    samples: int | None = 8
    """Most samples in a batch."""
    tokens: int | None = None
    """Most positions in a batch: padding included, or those of the packed row."""
    tiles: int | None = None
    """Most tiles in a batch."""
    grouped: bool = False
    """Samples of like length together (official `group_by_length`); always so where `tokens` or `tiles` is set."""
    packed: bool = False
    """One row, a segment a sample, instead of padded rows."""
    weighting: Weighting = "token"
    window: int = 1024
    """Samples, neighbours in the epoch's order, among which partners are sought; packed rows have `packing`."""
    packing: Packing = field(default_factory=Packing, repr=False)
    """How packed rows with a limit of tokens are filled."""

    def __post_init__(self) -> None:
        if self.samples is None and self.tokens is None:
            raise ValueError("a batch needs a limit: set samples, or tokens, or both")
        for name in ("samples", "tokens", "tiles", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @property
    def room(self) -> Room | None:
        """What a packed row holds; None where rows are not planned by packing.py."""
        return Room(self.tokens, self.tiles, self.samples) if self.packed and self.tokens is not None else None

    @property
    def longest(self) -> int | None:
        """Tokens of a sample at most; None where longer ones are cut."""
        return None if self.room is not None and self.packing.overflow != "never" else self.tokens

    @property
    def is_measured(self) -> bool:
        """Whether the size of every sample must be known beforehand."""
        return self.grouped or self.tokens is not None or self.tiles is not None


@dataclass
class _Group:
    members: list[int] = field(default_factory=list)
    tokens: int = 0
    """Of the longest member, or of all in a packed row."""
    tiles: int = 0

    def fits(self, tokens: int, tiles: int, settings: BatchSettings) -> bool:
        count = len(self.members) + 1
        length = self.tokens + tokens if settings.packed else max(self.tokens, tokens) * count
        return (
            (settings.samples is None or count <= settings.samples)
            and (settings.tokens is None or length <= settings.tokens)
            and (settings.tiles is None or self.tiles + tiles <= settings.tiles)
        )

    def add(self, member: int, tokens: int, tiles: int, packed: bool) -> None:
        self.members.append(member)
        self.tokens = self.tokens + tokens if packed else max(self.tokens, tokens)
        self.tiles += tiles


def group(counts: Int[np.ndarray, "samples 2"], settings: BatchSettings) -> Iterator[list[int]]:
    """Places of the samples of each batch: longest first; a row takes what still fits, a padded batch the next ones."""
    groups: list[_Group] = []
    num_closed = 0
    for member in np.argsort(-counts[:, 0], kind="stable").tolist():
        tokens, tiles = map(int, counts[member])
        chosen = next((open_ for open_ in groups[num_closed:] if open_.fits(tokens, tiles, settings)), None)
        if chosen is None:
            chosen = _Group()
            if not settings.packed:
                num_closed = len(groups)
            groups.append(chosen)
        chosen.add(member, tokens, tiles, settings.packed)
    return (sorted(chosen.members) for chosen in groups)
