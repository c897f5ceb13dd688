"""Which records share which batch, epoch after epoch, and where one stands: plans made of sizes, before any pixel.

A plan depends on the data, the settings and the seed alone, so workers and ranks change nothing: ranks take neighbours
of one sequence. Nothing of an epoch is kept but the order of its records; a cursor is plain JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from internvl.data.batching import BatchSettings, group
from internvl.data.mixture import Mixture
from internvl.data.packing import Packer, Row, deal
from internvl.data.splitting import Layout, Segment

Cursor = Mapping[str, Any]


class Plan(NamedTuple):
    """One batch to be made."""

    epoch: int
    places: Int[np.ndarray, " samples"]
    """In the epoch's order; they seed what is random about a sample."""
    numbers: Int[np.ndarray, " samples"]
    """Of the records."""
    parts: tuple[Segment | None, ...] = ()
    """What is taken of each sample; None, or nothing given, is all of it."""
    tokens: int = 0
    """Of a packed row; 0 where it was not planned by size."""
    tiles: int = 0


@runtime_checkable
class Plans(Protocol):
    """Batches in their order."""

    def first(self) -> Cursor: ...

    def walk(self, cursor: Cursor) -> Iterator[tuple[Plan, Cursor]]:
        """Plans from there on, without end, each with the cursor behind it."""

    def epoch(self, epoch: int) -> Iterator[Plan]:
        """The plans of one epoch."""

    def refit(self, cursor: Cursor) -> Cursor:
        """A cursor over records whose words have changed: from the same place on, by their sizes now."""


@dataclass
class Plain:
    """Batches of so many samples, or of samples of like length within budgets."""

    mixture: Mixture
    settings: BatchSettings
    counts: Callable[[], Int[np.ndarray, "records 2"]]
    """Tokens and tiles of every record; asked only where the settings need them."""
    tolerant: bool = False
    """A record that no batch can hold is planned alone, to be rejected; otherwise it is an error."""

    def first(self) -> Cursor:
        return {"epoch": 0, "batch": 0}

    def walk(self, cursor: Cursor) -> Iterator[tuple[Plan, Cursor]]:
        epoch, batch = int(cursor["epoch"]), int(cursor["batch"])
        while True:
            plans = self.epoch(epoch)
            plan = next(plans, None)
            number = 1
            while plan is not None:
                following = next(plans, None)
                if number > batch:
                    ends = following is None
                    yield plan, {"epoch": epoch + ends, "batch": 0 if ends else number}
                plan, number = following, number + 1
            epoch, batch = epoch + 1, 0

    def refit(self, cursor: Cursor) -> Cursor:
        """Nothing of a record is in it."""
        return cursor

    def epoch(self, epoch: int) -> Iterator[Plan]:
        numbers, settings = self.mixture.epoch(epoch), self.settings
        measured = settings.is_measured
        size = settings.window if measured else settings.samples or 1
        rng = np.random.default_rng([self.mixture.seed, epoch, 1])
        for first in range(0, len(numbers), size):
            places = np.arange(first, min(first + size, len(numbers)))
            if not measured:
                yield Plan(epoch, places, numbers[places])
                continue
            groups = list(group(self.counts()[numbers[places]], settings))
            for at in rng.permutation(len(groups)).tolist() if self.mixture.shuffle else range(len(groups)):
                chosen = places[groups[at]]
                if not self.tolerant:
                    check_budget(self.mixture, numbers[chosen], self.counts()[numbers[chosen]], settings)
                yield Plan(epoch, chosen, numbers[chosen])


@dataclass
class Packed:
    """Rows that packing.py fills and deals.

    A cursor says how many records the packer has read at the start of a window of rows, which rows were open then, and
    how many rows of the window are taken; so it goes on with any number of workers and ranks.
    """

    mixture: Mixture
    settings: BatchSettings
    counts: Callable[[], Int[np.ndarray, "records 2"]]
    layout: Callable[[int, int, int], Layout]
    """Of a record's number, the epoch and the place in it."""
    tolerant: bool = False
    """As of `Plain`."""

    def first(self) -> Cursor:
        return self._cursor(0, 0, 0, [])

    def walk(self, cursor: Cursor) -> Iterator[tuple[Plan, Cursor]]:
        while True:
            cursor = yield from self._walk_epoch(cursor)

    def epoch(self, epoch: int) -> Iterator[Plan]:
        return (plan for plan, _ in self._walk_epoch(self._cursor(epoch, 0, 0, [])))

    def refit(self, cursor: Cursor) -> Cursor:
        """Each sample of an open row in a row of its own, sized anew: together they may not fit any more."""
        if self.settings.packing.overflow != "never":
            raise ValueError(
                f"packing.overflow is {self.settings.packing.overflow!r}: of changed records nobody knows where the "
                "open ones were cut; put the old file back, or start anew"
            )
        epoch = int(cursor["epoch"])
        numbers = self.mixture.epoch(epoch)
        places = [int(segment[0]) for row in cursor["open"] for segment in row]
        return {**cursor, "open": [[list(self._sample(epoch, at, int(numbers[at])))] for at in places]}

    def _walk_epoch(self, cursor: Cursor) -> Generator[tuple[Plan, Cursor], None, Cursor]:
        """The rows of the rest of an epoch; the cursor where the next one begins."""
        epoch, window, read = (int(cursor[name]) for name in ("epoch", "window", "read"))
        numbers, packing = self.mixture.epoch(epoch), self.settings.packing
        if not self.tolerant:  # else the packer gives what fits no row a row of its own, to be rejected
            check_budget(self.mixture, numbers, self.counts()[numbers], self.settings, packing.overflow != "never")
        packer = self._packer(epoch, numbers)
        packer.load(cursor["open"])
        taken = int(cursor["taken"])
        while True:
            here = self._cursor(epoch, window, read, packer.state())
            rows: list[Row] = []
            while len(rows) < packing.window and read < len(numbers):
                rows += packer.add(self._sample(epoch, read, int(numbers[read])))
                read += 1
            if len(rows) < packing.window:
                rows += packer.drain()
            seed = [self.mixture.seed, epoch, 2, window]
            rows = deal(rows, packing.hand, np.random.default_rng(seed) if self.mixture.shuffle else None)
            ends = read == len(numbers) and packer.is_empty
            behind = (
                self._cursor(epoch + 1, 0, 0, []) if ends else self._cursor(epoch, window + 1, read, packer.state())
            )
            for number, row in enumerate(rows[taken:], taken + 1):
                yield self._plan(epoch, numbers, row), ({**here, "taken": number} if number < len(rows) else behind)
            if ends and not (window or rows):
                raise ValueError(f"{len(numbers)} records, no row among them: the official cut lost all; use 'split'")
            if ends:
                return behind
            window, taken = window + 1, 0

    @staticmethod
    def _cursor(epoch: int, window: int, read: int, rows: list[Any]) -> Cursor:
        return {"epoch": epoch, "window": window, "taken": 0, "read": read, "open": rows}

    def _packer(self, epoch: int, numbers: Int[np.ndarray, " entries"]) -> Packer:
        room = self.settings.room
        assert room is not None
        keep = lru_cache(maxsize=4096)
        return Packer(room, self.settings.packing, keep(lambda place: self.layout(int(numbers[place]), epoch, place)))

    def _sample(self, epoch: int, place: int, number: int) -> Segment:
        tokens, tiles = self.counts()[number].tolist()
        if (
            self.settings.packing.overflow == "official" and tokens
        ):  # a video has a random number of frames: cuts need the true one
            layout = self.layout(number, epoch, place)
            return layout.part(place, 0, len(layout.learned))
        return Segment(place, tokens, tiles)

    def _plan(self, epoch: int, numbers: Int[np.ndarray, " entries"], row: Row) -> Plan:
        places = np.asarray([segment.place for segment in row.segments])
        chosen = numbers[places]
        parts: tuple[Segment | None, ...] = ()
        if self.settings.packing.overflow != "never":
            parts = tuple(
                self._part(epoch, n, segment) for n, segment in zip(chosen.tolist(), row.segments, strict=True)
            )
        return Plan(epoch, places, chosen, parts, row.tokens, row.tiles)

    def _part(self, epoch: int, number: int, segment: Segment) -> Segment | None:
        if not segment.start and segment.tokens == int(self.counts()[number, 0]):
            return None
        return segment


def check_budget(
    mixture: Mixture,
    numbers: Int[np.ndarray, " samples"],
    counts: Int[np.ndarray, "samples 2"],
    settings: BatchSettings,
    may_be_cut: bool = False,
) -> None:
    """ValueError naming the largest record, where no batch can hold it."""
    limits = (("tokens", None if may_be_cut else settings.tokens), ("tiles", settings.tiles))
    for column, (noun, limit) in enumerate(limits):
        at = int(counts[:, column].argmax())
        value = int(counts[at, column])
        if limit is not None and value > limit:
            source = mixture.source(int(numbers[at]))
            raise ValueError(f"{source}: {value} {noun}; a batch may have {limit}; raise it or lower max_tiles")
