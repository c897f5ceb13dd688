"""Packing: samples into rows, in two dimensions, tokens and tiles (paper 2.5, section 4.2; official dataset_packed.py).

Knows sizes only: samples come in the order of mixture.py, rows become tensors in collate.py. Four steps, as in the
paper: a sample is selected, a row is searched for it, it is packed, and rows that are full are given away.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from internvl.data.splitting import Layout, Segment, official_cut, own_cut


@dataclass(frozen=True)
class Packing:
    """How rows are filled; the limits of a row are those of `BatchSettings`."""

    buffer: int = 64
    """Rows that are open at a time (official `max_buffer_size`, 20): more fill better and plan a little longer."""
    search: Literal["fullest", "official"] = "fullest"
    """The row for a sample: the one that it fills most, or the official one, with most tiles. Both by binary search."""
    overflow: Literal["never", "split", "official"] = "never"
    """A sample longer than a row: refused; cut in parts that lose no learned token; the official cut
    (`allow_overflow`), which also cuts to fill a row, and loses words before the next picture and parts without one."""
    hand: int = 8
    """Rows of like tokens and tiles that are dealt together: the number of ranks, or a multiple of it."""
    window: int = 512
    """Rows among which a hand is put together."""

    def __post_init__(self) -> None:
        for name in ("buffer", "hand", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"packing.{name} is {getattr(self, name)}; it must be at least 1")
        if self.overflow == "official" and self.search != "official":
            raise ValueError(
                "packing.overflow is 'official' but packing.search is not; set both, or overflow to 'split'"
            )


class Room(NamedTuple):
    """What a row holds at most."""

    tokens: int
    tiles: int | None = None
    samples: int | None = None


@dataclass
class Row:
    """Pieces that share a row."""

    segments: list[Segment] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0

    def add(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.tokens += segment.tokens
        self.tiles += segment.tiles


class Packer:
    """Open rows, and the search among them. `add` gives the rows that became full, `drain` the rest."""

    def __init__(self, room: Room, settings: Packing, layout: Callable[[int], Layout] | None = None) -> None:
        """`layout` tells of a place in the epoch where its pictures and learned tokens are; needed to cut samples."""
        self.room, self.settings, self._layout = room, settings, layout
        self._official = settings.search == "official"
        self._open: list[Row] = []
        self._keys: list[int] = []
        """Of the open rows, ascending: how full they are; officially, tiles from most to fewest."""
        self._full: list[Row] = []

    def add(self, segment: Segment) -> list[Row]:
        """Put a sample into a row; the rows that are given away now."""
        for part in self._parts(segment):
            at = self._search(part)
            row = Row() if at is None else self._take(at)
            row.add(part)
            for kept in self._cut(row):
                self._put(kept)
        return self._maintain()

    def drain(self) -> list[Row]:
        """What is left at the end of an epoch; officially the open rows as they are, else packed once more."""
        rows, self._open, self._keys = self._open, [], []
        full, self._full = self._full, []
        if not self._official:
            segments = sorted((p for row in rows for p in row.segments), key=lambda p: (-p.tokens, -p.tiles, p.place))
            rows = list(_best_fit(segments, self.room))
        return full + rows

    @property
    def is_empty(self) -> bool:
        return not self._open and not self._full

    def state(self) -> list[list[list[int]]]:
        """The open rows as plain JSON."""
        return [[list(segment) for segment in row.segments] for row in [*self._full, *self._open]]

    def load(self, state: Iterable[Iterable[Sequence[int]]]) -> None:
        """Stand where `state` was taken."""
        self._open, self._keys, self._full = [], [], []
        for segments in state:
            row = Row()
            for segment in segments:
                row.add(Segment(*segment))
            self._put(row)

    # search

    def _search(self, segment: Segment) -> int | None:
        if self._official:
            return self._search_official(segment)
        last = bisect_right(self._keys, self._fullness(self.room.tokens - segment.tokens, self._tile_room(segment)))
        return next((at for at in reversed(range(last)) if fits(self._open[at], segment, self.room)), None)

    def _tile_room(self, segment: Segment) -> int:
        return 0 if self.room.tiles is None else self.room.tiles - segment.tiles

    def _search_official(self, segment: Segment) -> int | None:
        """The first of those whose tiles fit, from most tiles on; one that overflows if the buffer is half full."""
        first = 0 if self.room.tiles is None else bisect_left(self._keys, segment.tiles - self.room.tiles)
        for at in range(first, len(self._open)):
            if fits(self._open[at], segment, self.room):
                return at
        may_overflow = self.settings.overflow == "official" and len(self._open) >= self.settings.buffer // 2
        return len(self._open) - 1 if may_overflow and first < len(self._open) else None

    # pack

    def _parts(self, segment: Segment) -> list[Segment]:
        if self.settings.overflow != "split" or segment.tokens <= self.room.tokens:
            return [segment]
        return own_cut(segment, self.room.tokens, self._layout_of(segment.place))

    def _cut(self, row: Row) -> list[Row]:
        if row.tokens <= self.room.tokens or self.settings.overflow != "official":
            return [row]
        rows = []
        for segments in official_cut(row.segments, self.room.tokens, self._layout_of):
            rows.append(Row())
            for segment in segments:
                rows[-1].add(segment)
        return rows

    def _layout_of(self, place: int) -> Layout:
        assert self._layout is not None, "samples can be cut only where their layout is known"
        return self._layout(place)

    # maintain

    def _maintain(self) -> list[Row]:
        given, self._full = (self._full[:1], self._full[1:]) if self._official else (self._full, [])
        if self._official:
            while self._open and self._has_no_tile_left(self._open[0]):
                given.append(self._take(0))
        while len(self._open) > self.settings.buffer:
            given.append(self._take(0 if self._official else -1))
        return given

    def _take(self, at: int) -> Row:
        self._keys.pop(at)
        return self._open.pop(at)

    def _put(self, row: Row) -> None:
        full = row.tokens >= self.room.tokens or (not self._official and self._has_no_tile_left(row))
        if full:
            self._full.append(row)
            return
        key = -row.tiles if self._official else self._fullness(row.tokens, row.tiles)
        at = bisect_right(self._keys, key)
        self._keys.insert(at, key)
        self._open.insert(at, row)

    def _has_no_tile_left(self, row: Row) -> bool:
        """A sample of too many tiles has a row of its own, which whoever makes it rejects."""
        return self.room.tiles is not None and row.tiles >= self.room.tiles

    def _fullness(self, tokens: int, tiles: int) -> int:
        """The larger of both shares, over a common denominator: no rounding decides who comes first."""
        return tokens if self.room.tiles is None else max(tokens * self.room.tiles, tiles * self.room.tokens)


def fits(row: Row, segment: Segment, room: Room) -> bool:
    return (
        row.tokens + segment.tokens <= room.tokens
        and (room.tiles is None or row.tiles + segment.tiles <= room.tiles)
        and (room.samples is None or len(row.segments) < room.samples)
    )


def _best_fit(segments: Iterable[Segment], room: Room) -> Iterator[Row]:
    """Each segment into the fullest row that takes it, fullest rows first."""
    packer = Packer(room, Packing(buffer=1 << 30))
    full = [row for segment in segments for row in packer.add(segment)]
    yield from full
    yield from packer._full
    yield from reversed(packer._open)


def deal(rows: list[Row], hand: int, rng: np.random.Generator | None) -> list[Row]:
    """Rows in hands of like tiles and tokens; the order of hands, and that within a hand, is drawn.

    Ranks that take neighbouring rows then wait little for each other; which step sees which tile count stays random.
    """
    if rng is None or not rows:
        return rows
    alike = sorted(rows, key=lambda row: (row.tiles, row.tokens))
    hands = [alike[first : first + hand] for first in range(0, len(alike), hand)]
    whole = len(hands) - (len(hands[-1]) < hand)
    # a hand that is not whole comes last: before others it would shift them against the ranks
    order = [*rng.permutation(whole).tolist(), *range(whole, len(hands))]
    return [hands[at][place] for at in order for place in rng.permutation(len(hands[at])).tolist()]


@dataclass
class Tally:
    """What rows held and what ranks waited, added up."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    tiles: int = 0
    room_tokens: int = 0
    room_tiles: int = 0
    longest_tokens: int = 0
    """Over steps: ranks x tokens of the longest row among them."""
    most_tiles: int = 0

    def add(self, group: Sequence[Row], room: Room) -> None:
        """Rows that ranks run at the same time."""
        self.rows += len(group)
        self.samples += sum(len(row.segments) for row in group)
        self.tokens += sum(row.tokens for row in group)
        self.tiles += sum(row.tiles for row in group)
        self.room_tokens += room.tokens * len(group)
        self.room_tiles += (room.tiles or 0) * len(group)
        self.longest_tokens += len(group) * max(row.tokens for row in group)
        self.most_tiles += len(group) * max(row.tiles for row in group)

    def read(self) -> dict[str, float]:
        """Fill, samples and tiles a row; share of the time that ranks idle if tokens, or tiles, take all of it."""
        return {
            "fill": self.tokens / max(1, self.room_tokens),
            "fill_tiles": self.tiles / self.room_tiles if self.room_tiles else 0.0,
            "samples_per_row": self.samples / max(1, self.rows),
            "tiles_per_row": self.tiles / max(1, self.rows),
            "idle_tokens": 1 - self.tokens / max(1, self.longest_tokens),
            "idle_tiles": 1 - self.tiles / max(1, self.most_tiles) if self.most_tiles else 0.0,
        }


def simulate(
    sizes: Iterable[tuple[int, int]],
    room: Room,
    settings: Packing | None = None,
    ranks: int = 8,
    seed: int | None = 0,
) -> tuple[Tally, list[Row]]:
    """Rows of samples of these tokens and tiles, dealt to ranks: what a run would see, without pictures or a model."""
    settings = settings or Packing()
    packer = Packer(room, settings)
    rows: list[Row] = []
    for place, (tokens, tiles) in enumerate(sizes):
        rows += packer.add(Segment(place, tokens, tiles))
    rows += packer.drain()
    rng = None if seed is None else np.random.default_rng(seed)
    windows = (rows[first : first + settings.window] for first in range(0, len(rows), settings.window))
    dealt = [row for window in windows for row in deal(window, settings.hand, rng)]
    tally = Tally()
    for first in range(0, len(dealt), ranks):
        tally.add(dealt[first : first + ranks], room)
    return tally, dealt
