"""The whole chain, from sets to batches, in worker processes; stops and resumes at any batch, exactly.

Which record comes when is mixture.py's, how it becomes tensors encode.py's. Everything random follows from the seed,
the epoch and the place in the epoch, so the number of workers changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from internvl.batch import ChatBatch
from internvl.data.batching import BatchSettings, group
from internvl.data.collate import collate, collate_packed
from internvl.data.encode import Encoder, Sample
from internvl.data.measure import measure, unchanged
from internvl.data.mixture import DataSet, Mixture


class _Plan(NamedTuple):
    """One batch to be made."""

    epoch: int
    places: Int[np.ndarray, " samples"]
    """In the epoch's order; they seed what is random about a sample."""
    numbers: Int[np.ndarray, " samples"]
    """Of the records."""


class _Made(NamedTuple):
    batch: ChatBatch | None
    problems: dict[str, str]
    """File and line of what could not be used, and why."""
    num_cut: int


@dataclass
class _Work(Dataset[_Made]):
    """What a worker process holds: plans in, batches out."""

    mixture: Mixture
    encoders: list[Encoder]
    settings: BatchSettings
    pad_id: int
    skips: bool

    def __getitem__(self, plan: _Plan) -> _Made:
        samples: list[Sample] = []
        problems: dict[str, str] = {}
        for place, number in zip(plan.places.tolist(), plan.numbers.tolist(), strict=True):
            try:
                samples.append(self._sample(number, np.random.default_rng([self.mixture.seed, plan.epoch, place])))
            except (ValueError, OSError) as error:
                problems[self.mixture.source(number)] = str(error)
                if not self.skips:
                    return _Made(None, problems, 0)
        if not samples:
            return _Made(None, problems, 0)
        join = collate_packed if self.settings.packed else collate
        batch = join(samples, self.pad_id, self.settings.weighting)
        return _Made(batch, problems, sum(sample.num_cut > 0 for sample in samples))

    def _sample(self, number: int, rng: np.random.Generator) -> Sample:
        index, position = self.mixture.locate(number)
        return self.encoders[index].encode(self.mixture.sets[index].record(position), rng)


@dataclass
class Loader:
    """Batches without end, epoch after epoch; `state_dict` is the place of the next one."""

    sets: Sequence[DataSet]
    encoder: Encoder
    pad_id: int
    settings: BatchSettings = field(default_factory=BatchSettings)
    seed: int = 0
    shuffle: bool = True
    workers: int = 0
    prefetch: int = 4
    """Batches that each worker makes ahead."""
    pin_memory: bool = False
    on_error: Literal["error", "skip"] = "error"
    """A record that cannot be used ends the run, or is skipped, counted and named."""
    skipped: dict[str, str] = field(default_factory=dict, init=False)
    """File and line of what was skipped, and why."""
    num_skipped: int = field(default=0, init=False)
    num_cut: int = field(default=0, init=False)
    """Samples that were cut because they were too long."""

    def __post_init__(self) -> None:
        self._mixture = Mixture(self.sets, self.seed, self.shuffle)
        encoders = [_encoder_of(self.encoder, data) for data in self.sets]
        self._work = _Work(self._mixture, encoders, self.settings, self.pad_id, self.on_error == "skip")
        self._epoch, self._batch = 0, 0
        self._known: tuple[int, list[_Plan]] = (-1, [])

    def __iter__(self) -> Iterator[ChatBatch]:
        """From where the loader stands, without end."""
        places: list[tuple[int, int]] = []  # of the batches that workers are ahead
        for batch in self._make(self._plans_from(self._epoch, self._batch, places)):
            self._epoch, self._batch = places.pop(0)
            if batch is not None:
                yield batch

    def once(self) -> Iterator[ChatBatch]:
        """One epoch; the loader's own place stays."""
        return (batch for batch in self._make(iter(self._plans(0))) if batch is not None)

    def __len__(self) -> int:
        """Batches of the epoch in which the loader stands."""
        return len(self._plans(self._epoch))

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, as plain JSON."""
        return {"epoch": self._epoch, "batch": self._batch, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a state; data and settings must be those it was taken with."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the state is of other data or settings ({state['fingerprint']}, here {self._fingerprint}); "
                "resume with the same sets, seed, batch settings, max_length and tiles, or start anew"
            )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def describe(self, batch: ChatBatch) -> str:
        """Files and lines of a batch."""
        return ", ".join(batch.sources)

    @cached_property
    def _fingerprint(self) -> str:
        sets = [(data.annotation, len(data.lines), data.repeat, data.max_tiles, data.augment) for data in self.sets]
        settings = (self.seed, self.shuffle, self.settings, self.encoder.max_length, self.encoder.config)
        return hashlib.sha256(repr((sets, settings)).encode()).hexdigest()[:16]

    # plans

    @cached_property
    def _counts(self) -> Int[np.ndarray, "records 2"]:
        """Tokens and tiles of every record."""
        return np.concatenate(
            [measure(data, encoder, self.workers) for data, encoder in zip(self.sets, self._work.encoders, strict=True)]
        )

    def _plans_from(self, epoch: int, batch: int, places: list[tuple[int, int]]) -> Iterator[_Plan]:
        """Plans from there on; `places` gets where the loader stands after each."""
        while True:
            plans = self._plans(epoch)
            for number, plan in enumerate(plans[batch:], batch + 1):
                places.append((epoch, number) if number < len(plans) else (epoch + 1, 0))
                yield plan
            epoch, batch = epoch + 1, 0

    def _plans(self, epoch: int) -> list[_Plan]:
        if self._known[0] != epoch:
            self._known = epoch, list(self._plan(epoch))
        return self._known[1]

    def _plan(self, epoch: int) -> Iterator[_Plan]:
        numbers = self._mixture.epoch(epoch)
        measured = self.settings.is_measured
        size = self.settings.window if measured else self.settings.samples or 1
        rng = np.random.default_rng([self.seed, epoch, 1])
        for first in range(0, len(numbers), size):
            places = np.arange(first, min(first + size, len(numbers)))
            if not measured:
                yield _Plan(epoch, places, numbers[places])
                continue
            groups = list(group(self._counts[numbers[places]], self.settings))
            for at in rng.permutation(len(groups)).tolist() if self.shuffle else range(len(groups)):
                chosen = places[groups[at]]
                self._check_budget(numbers[chosen])
                yield _Plan(epoch, chosen, numbers[chosen])

    def _check_budget(self, numbers: Int[np.ndarray, " samples"]) -> None:
        tokens, tiles = self._counts[numbers].max(0).tolist()
        for noun, value, limit in (("tokens", tokens, self.settings.tokens), ("tiles", tiles, self.settings.tiles)):
            if limit is not None and value > limit:
                source = self._mixture.source(int(numbers[0]))
                raise ValueError(f"{source}: {value} {noun}; a batch may have {limit}; raise it or lower max_tiles")

    # batches

    def _make(self, plans: Iterator[_Plan]) -> Iterator[ChatBatch | None]:
        """The batch of each plan; None where every sample of it was skipped."""
        num_empty = 0
        for made in self._run(plans):
            if made.problems and self.on_error == "error":
                raise ValueError(_sentence(*next(iter(made.problems.items()))))
            self.skipped.update(made.problems)
            self.num_skipped += len(made.problems)
            self.num_cut += made.num_cut
            num_empty = 0 if made.batch is not None else num_empty + 1
            if num_empty > len(self._mixture):
                raise ValueError(f"{num_empty} batches in a row had no usable record; the last: {made.problems}")
            yield made.batch

    def _run(self, plans: Iterator[_Plan]) -> Iterator[_Made]:
        if not self.workers:
            return (self._work[plan] for plan in plans)
        return iter(
            DataLoader(
                self._work,
                batch_size=None,
                sampler=plans,
                num_workers=self.workers,
                collate_fn=unchanged,
                prefetch_factor=self.prefetch,
                pin_memory=self.pin_memory,
                multiprocessing_context="fork",
            )
        )


def _encoder_of(encoder: Encoder, data: DataSet) -> Encoder:
    config = encoder.config if data.max_tiles is None else replace(encoder.config, max_tiles=data.max_tiles)
    return replace(encoder, config=config, augment=encoder.augment or data.augment)


def _sentence(source: str, message: str) -> str:
    return message if message.startswith(source) else f"{source}: {message}"
