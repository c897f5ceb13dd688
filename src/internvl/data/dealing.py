"""Records of a mixture, epoch after epoch without a gap, for loaders that deal them in joint batches of equal size.

A batch may hold the end of one epoch and the beginning of the next. Everything random follows from the seed, the epoch
and the place in it, so neither workers nor ranks change what the n-th joint batch has. What becomes of a record is
pair_loader.py's and translations.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

from internvl.data.mixture import DataSet, Mixture

Numbers: TypeAlias = Int[np.ndarray, " entries"]


class Entry(NamedTuple):
    """A record's turn."""

    epoch: int
    place: int
    """In the epoch's order."""
    number: int
    """Of the record."""


class Epochs:
    """The entries of a mixture. `kept` says which numbers of an epoch are dealt; all, where it is not given."""

    def __init__(self, mixture: Mixture, kept: Callable[[Numbers], Numbers] | None = None) -> None:
        self._mixture, self._kept = mixture, kept
        self._orders: dict[int, Numbers] = {}

    def __len__(self) -> int:
        """Entries of the first epoch."""
        return len(self.order(0))

    def order(self, epoch: int) -> Numbers:
        """Numbers of its records."""
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known in (0, epoch - 1)}
            numbers = self._mixture.epoch(epoch)
            self._orders[epoch] = numbers if self._kept is None else self._kept(numbers)
        return self._orders[epoch]

    def deal(self, epoch: int, place: int, count: int) -> tuple[list[Entry], int, int]:
        """`count` entries from this place of this epoch on; epoch and place of the next one."""
        entries: list[Entry] = []
        while len(entries) < count:
            order = self.order(epoch)
            taken = order[place : place + count - len(entries)].tolist()
            entries += [Entry(epoch, place + n, number) for n, number in enumerate(taken)]
            place += len(taken)
            if place >= len(order):  # beyond it where fewer records of changed files are dealt
                epoch, place = epoch + 1, 0
        return entries, epoch, place

    def once(self, samples: int) -> Iterator[list[Entry]]:
        """The first epoch, `samples` entries at a time; the last ones are fewer."""
        entries = self.deal(0, 0, len(self))[0]
        return (entries[n : n + samples] for n in range(0, len(entries), samples))


def part_of(samples: int, ranks: int, what: str, whose: str = "ranks") -> int:
    """Samples of a joint batch that each rank brings; ValueError where they cannot be equal."""
    if samples < 1:
        raise ValueError(f"data.batch_samples is {samples}; it must be at least 1")
    if samples % ranks:
        raise ValueError(
            f"data.batch_samples is {samples} {what} a step, which {ranks} {whose} cannot share evenly; set it to a "
            f"multiple of {ranks}"
        )
    return samples // ranks


def fingerprint(sets: Sequence[DataSet], *settings: Any) -> str:
    """Of what decides the order: a place means nothing in another one."""
    described = [(data.annotation, len(data.lines), data.repeat) for data in sets]
    return hashlib.sha256(repr((described, *settings)).encode()).hexdigest()[:16]
