"""Sets of pairs to batches of equal size, without end; stops and resumes at any batch, exactly.

No pair is left out and no rank ever has a smaller batch: dealing.py. Neither workers nor ranks change what the n-th
joint batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from internvl.batch import PairBatch
from internvl.data.contents import Changed, check_state, contents
from internvl.data.dealing import Entry, Epochs, Numbers, fingerprint, part_of
from internvl.data.image_text import Pair, PairEncoder, PairSample, collate_pairs, parse_pair
from internvl.data.measure import started, unchanged
from internvl.data.mixture import DataSet, Mixture

MAX_DRAWS = 100
"""Records looked at for another one that will do, before the data is blamed."""


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

    def __getitem__(self, entries: list[Entry]) -> _Made:
        samples: list[PairSample] = []
        valid: list[bool] = []
        problems: dict[str, str] = {}
        for entry in entries:
            try:
                samples.append(self._sample(entry))
                valid.append(True)
            except (ValueError, OSError) as error:
                source = self.mixture.source(entry.number)
                problems[source] = str(error) if str(error).startswith(source) else f"{source}: {error}"
                if not self.skips:
                    return _Made(None, problems, 0)
                other = self._stand_in(entry)
                if other is None:
                    more = f"{MAX_DRAWS} draws gave no pair to stand in its place: look at the paths of the data"
                    return _Made(None, {source: f"{problems[source]}; {more}"}, 0)
                samples.append(other)
                valid.append(False)
        num_cut = sum(sample.is_cut for sample, usable in zip(samples, valid, strict=True) if usable)
        return _Made(
            collate_pairs(samples, valid, self.encoder.settings.side, self.known is not None), problems, num_cut
        )

    def _sample(self, entry: Entry) -> PairSample:
        seed = [self.mixture.seed, entry.epoch, entry.place]
        pair = read_pair(self.mixture, entry.number)
        negative = self._other_text(pair, np.random.default_rng([*seed, 1])) if self.negatives else None
        wanted = self.known is None or not self.known(pair.name)
        return self.encoder.encode(pair, np.random.default_rng(seed), negative, wanted)

    def _stand_in(self, entry: Entry) -> PairSample | None:
        """A pair in the place of one that cannot be used, drawn by the place: on any number of ranks the same."""
        rng = np.random.default_rng([self.mixture.seed, entry.epoch, entry.place, 2])
        for _ in range(MAX_DRAWS):
            try:
                return self._sample(entry._replace(number=int(rng.integers(len(self.mixture)))))
            except (ValueError, OSError):  # its own turn tells it
                continue
        return None

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
    changed: Changed = "error"
    known: Callable[[bytes], bool] | None = None
    """Says whether the features of a picture are kept; its pixels are then left out."""
    skipped: dict[str, str] = field(default_factory=dict, init=False)
    num_cut: int = field(default=0, init=False)
    """Texts whose end the model does not see."""

    def __post_init__(self) -> None:
        self._own = part_of(self.samples, self.ranks, "pairs")
        self._mixture = Mixture(self.sets, self.seed, self.shuffle)
        self._epochs = Epochs(self._mixture)
        self._entry = 0

    def __iter__(self) -> Iterator[PairBatch]:
        """This rank's part of each batch, from where the loader stands, without end."""
        starts = range(self._entry + self.rank * self._own, 2**62, self.samples)
        for made in self._make(self._epochs.deal(*divmod(start, self.num_pairs), self._own)[0] for start in starts):
            place = self._entry
            self._entry += self.samples
            yield replace(made, place=place)

    def once(self) -> Iterator[PairBatch]:
        """One epoch in order, the last batch smaller; the same on every rank; the loader's own place stays."""
        return self._make(self._epochs.once(self.samples))

    @property
    def num_records(self) -> int:
        """Each counted once."""
        return len(self._mixture)

    def pair(self, number: int) -> Pair:
        """A record by its number; ValueError where it is no pair."""
        return read_pair(self._mixture, number)

    def numbers(self, count: int) -> Numbers:
        """Of the records that come first in a run."""
        return np.array([entry.number for entry in self._epochs.deal(0, 0, count)[0]])

    @property
    def num_pairs(self) -> int:
        """Of an epoch."""
        return len(self._epochs)

    def __len__(self) -> int:
        """Batches that cover an epoch."""
        return -(-self.num_pairs // self.samples)

    def state_dict(self) -> dict[str, Any]:
        return {"entry": self._entry, "fingerprint": self._fingerprint, "contents": self._contents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a state; data and settings must be those it was taken with."""
        what = "sets, seed, picture size, crop and masking"
        check_state(state, self._fingerprint, self._contents, self.changed, what)
        self._entry = int(state["entry"])

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.sets, (self.seed, self.shuffle, self.negatives, self.encoder.settings))

    @cached_property
    def _contents(self) -> dict[str, str]:
        return contents(self.sets)

    def _make(self, plans: Iterator[list[Entry]]) -> Iterator[PairBatch]:
        for made in self._run(plans):
            if made.batch is None:
                raise ValueError(next(iter(made.problems.values())))
            self.skipped.update(made.problems)
            self.num_cut += made.num_cut
            yield made.batch

    def _run(self, plans: Iterator[list[Entry]]) -> Iterator[_Made]:
        work = _Work(self._mixture, self.encoder, self.negatives, self.on_error == "skip", self.known)
        if not self.workers:
            return (work[plan] for plan in plans)
        return started(
            DataLoader(
                work,
                batch_size=None,
                sampler=plans,
                num_workers=self.workers,
                collate_fn=unchanged,
                multiprocessing_context="fork",
                generator=torch.Generator(),  # else the number of workers moves what dropout draws
            )
        )
