"""Sets of pairs to batches of equal size, without end; stops and resumes at any batch, exactly.

Epochs follow each other without a gap: a batch may hold the end of one and the beginning of the next, so no pair is
left out and no rank ever has a smaller batch. Everything random follows from the seed, the epoch and the place in it,
so neither the number of workers nor that of ranks changes which pairs the n-th joint batch has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from internvl.batch import PairBatch
from internvl.data.image_text import Pair, PairEncoder, PairSample, collate_pairs, parse_pair
from internvl.data.measure import unchanged
from internvl.data.mixture import DataSet, Mixture

MAX_DRAWS = 100
"""Records looked at for a text of another picture, before the data is blamed."""


class _Entry(NamedTuple):
    epoch: int
    place: int
    """In the epoch's order."""
    number: int
    """Of the record."""


class _Made(NamedTuple):
    batch: PairBatch | None
    problems: dict[str, str]
    num_cut: int


def read_pair(mixture: Mixture, number: int) -> Pair:
    """A record of a mixture; ValueError where it is no pair."""
    index, position = mixture.locate(number)
    data = mixture.sets[index]
    return parse_pair(data.lines.read(position), data.root, data.source(position))


@dataclass
class _Work(Dataset[_Made]):
    """What a worker process holds: entries in, batches out."""

    mixture: Mixture
    encoder: PairEncoder
    negatives: bool
    skips: bool
    known: Callable[[bytes], bool] | None

    def __getitem__(self, entries: list[_Entry]) -> _Made:
        found: list[PairSample | None] = []
        problems: dict[str, str] = {}
        for entry in entries:
            try:
                found.append(self._sample(entry))
            except (ValueError, OSError) as error:
                source = self.mixture.source(entry.number)
                problems[source] = str(error) if str(error).startswith(source) else f"{source}: {error}"
                found.append(None)
                if not self.skips:
                    return _Made(None, problems, 0)
        usable = [sample for sample in found if sample is not None]
        if not usable:
            return _Made(None, problems, 0)
        samples = [sample or usable[0] for sample in found]
        valid = [sample is not None for sample in found]
        batch = collate_pairs(samples, valid, self.encoder.settings.side, self.known is not None)
        return _Made(batch, problems, sum(sample.is_cut for sample in usable))

    def _sample(self, entry: _Entry) -> PairSample:
        seed = [self.mixture.seed, entry.epoch, entry.place]
        pair = read_pair(self.mixture, entry.number)
        negative = self._other_text(pair, np.random.default_rng([*seed, 1])) if self.negatives else None
        wanted = self.known is None or not self.known(pair.name)
        return self.encoder.encode(pair, np.random.default_rng(seed), negative, wanted)

    def _other_text(self, pair: Pair, rng: np.random.Generator) -> str:
        """A text of a picture drawn from all records: never of this one, nor one that reads like its own."""
        for _ in range(MAX_DRAWS):
            try:
                other = read_pair(self.mixture, int(rng.integers(len(self.mixture))))
            except ValueError:  # its own turn tells it
                continue
            text = other.captions[int(rng.integers(len(other.captions)))]
            if other.name != pair.name and text not in pair.captions:
                return text
        raise ValueError(
            f"{pair.source}: {MAX_DRAWS} draws gave no text of another picture; add pictures with other captions"
        )


@dataclass
class PairLoader:
    """Batches of `samples` pairs, those of all ranks together; `state_dict` is the place of the next one."""

    sets: Sequence[DataSet]
    encoder: PairEncoder
    samples: int
    seed: int = 0
    shuffle: bool = True
    negatives: bool = False
    """Draw a text of another picture for each pair."""
    workers: int = 0
    on_error: Literal["error", "skip"] = "error"
    rank: int = 0
    ranks: int = 1
    known: Callable[[bytes], bool] | None = None
    """Says whether the features of a picture are kept; its pixels are then left out."""
    skipped: dict[str, str] = field(default_factory=dict, init=False)
    num_cut: int = field(default=0, init=False)
    """Texts whose end the model does not see."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"data.batch_samples is {self.samples}; it must be at least 1")
        if self.samples % self.ranks:
            raise ValueError(
                f"data.batch_samples is {self.samples} pairs a step, which {self.ranks} ranks cannot share evenly; set "
                f"it to a multiple of {self.ranks}"
            )
        self._mixture = Mixture(self.sets, self.seed, self.shuffle)
        self._entry = 0
        self._orders: dict[int, Int[np.ndarray, " entries"]] = {}

    def __iter__(self) -> Iterator[PairBatch]:
        """This rank's part of each batch, from where the loader stands, without end."""
        own = self.samples // self.ranks
        starts = iter(range(self._entry + self.rank * own, 2**62, self.samples))
        for made in self._make([self._at(start + n) for n in range(own)] for start in starts):
            place = self._entry
            self._entry += self.samples
            yield replace(made, place=place)

    def once(self) -> Iterator[PairBatch]:
        """One epoch in order, the last batch smaller; the same on every rank; the loader's own place stays."""
        order = [_Entry(0, place, int(number)) for place, number in enumerate(self._order(0))]
        return self._make(order[n : n + self.samples] for n in range(0, len(order), self.samples))

    @property
    def num_records(self) -> int:
        """Each counted once."""
        return len(self._mixture)

    def pair(self, number: int) -> Pair:
        """A record by its number; ValueError where it is no pair."""
        return read_pair(self._mixture, number)

    def numbers(self, count: int) -> Int[np.ndarray, " entries"]:
        """Of the records that come first in a run."""
        return np.array([self._at(entry).number for entry in range(count)])

    @property
    def num_pairs(self) -> int:
        """Of an epoch."""
        return len(self._order(0))

    def __len__(self) -> int:
        """Batches that cover an epoch."""
        return -(-self.num_pairs // self.samples)

    def state_dict(self) -> dict[str, Any]:
        return {"entry": self._entry, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a state; data and settings must be those it was taken with."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the state is of other data or settings ({state['fingerprint']}, here {self._fingerprint}); resume "
                "with the same sets, seed, picture size, crop and masking, or start anew"
            )
        self._entry = int(state["entry"])

    @cached_property
    def _fingerprint(self) -> str:
        sets = [(data.annotation, len(data.lines), data.repeat) for data in self.sets]
        settings = (self.seed, self.shuffle, self.negatives, self.encoder.settings)
        return hashlib.sha256(repr((sets, settings)).encode()).hexdigest()[:16]

    def _at(self, entry: int) -> _Entry:
        epoch, place = divmod(entry, self.num_pairs)
        return _Entry(epoch, place, int(self._order(epoch)[place]))

    def _order(self, epoch: int) -> Int[np.ndarray, " entries"]:
        if epoch not in self._orders:
            self._orders = {kept: order for kept, order in self._orders.items() if kept in (0, epoch - 1)}
            self._orders[epoch] = self._mixture.epoch(epoch)
        return self._orders[epoch]

    def _make(self, plans: Iterator[list[_Entry]]) -> Iterator[PairBatch]:
        for made in self._run(plans):
            if made.problems and self.on_error == "error":
                raise ValueError(next(iter(made.problems.values())))
            if made.batch is None:
                raise ValueError(f"a batch without a usable pair; the last: {next(iter(made.problems.values()))}")
            self.skipped.update(made.problems)
            self.num_cut += made.num_cut
            yield made.batch

    def _run(self, plans: Iterator[list[_Entry]]) -> Iterator[_Made]:
        work = _Work(self._mixture, self.encoder, self.negatives, self.on_error == "skip", self.known)
        if not self.workers:
            return (work[plan] for plan in plans)
        return iter(
            DataLoader(
                work,
                batch_size=None,
                sampler=plans,
                num_workers=self.workers,
                collate_fn=unchanged,
                multiprocessing_context="fork",
            )
        )
