"""The whole chain, from sets to batches, in worker processes; stops and resumes at any batch, exactly.

Which record comes when is mixture.py's, how it becomes tensors encode.py's. Everything random follows from the seed,
the epoch and the place in the epoch, so the number of workers changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader

from internvl.batch import ChatBatch, Company
from internvl.data.batching import BatchSettings
from internvl.data.collate import collate_nothing
from internvl.data.contents import Changed, check_state, contents
from internvl.data.encode import Encoder
from internvl.data.ledger import Ledger, Quarantine
from internvl.data.measure import measure, started, unchanged
from internvl.data.media import FrameSettings
from internvl.data.mixture import DataSet, Mixture
from internvl.data.plans import Cursor, Packed, Plain, Plan, Plans
from internvl.data.work import Made, Work


class BatchSize(NamedTuple):
    """What a batch will hold, known before it is made."""

    samples: int
    tokens: int
    """Positions of its samples."""
    positions: int
    """Those and the padding."""
    squares: int
    """Sum over samples of the square of the row they attend in, for the cost of attention."""
    tiles: int


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
    on_error: Literal["error", "skip", "quarantine"] = "error"
    """A record that cannot be used ends the run, or is left out, counted and named, or written to a file as well."""
    max_rejected: float = 1.0
    """Largest share of records left out before the run ends: of an epoch, or of all given so far if that is more."""
    quarantine: Path | None = None
    """The file of `on_error="quarantine"`."""
    changed: Changed = "error"
    skipped: dict[str, str] = field(default_factory=dict, init=False)
    """File and line of what was left out, and why."""
    ledger: Ledger = field(default_factory=Ledger, init=False)
    """What became of every record since the beginning of the run; part of the state. Of a rank: of its own records."""

    def __post_init__(self) -> None:
        if (self.on_error == "quarantine") != (self.quarantine is not None):
            raise ValueError(f"on_error is {self.on_error!r} and quarantine {self.quarantine}; give both or neither")
        self._mixture = Mixture(self.sets, self.seed, self.shuffle)
        encoders = [encoder_of(self.encoder, data) for data in self.sets]
        self._work = Work(self._mixture, encoders, self.settings, self.pad_id, self.on_error != "error")
        mixture, settings, tolerant = self._mixture, self.settings, self.on_error != "error"
        self._plans: Plans = Plain(mixture, settings, lambda: self._counts, tolerant)
        if settings.room is not None:
            self._plans = Packed(mixture, settings, lambda: self._counts, self._work.layout, tolerant)
        self._cursor = self._plans.first()
        self._length: tuple[int, int] = (-1, 0)
        self._aside: Quarantine | None = None
        self._resumed = False

    @property
    def num_skipped(self) -> int:
        return self.ledger.num_rejected

    @property
    def num_cut(self) -> int:
        """Samples that were cut because they were too long."""
        return self.ledger.cut.total()

    def __iter__(self) -> Iterator[ChatBatch]:
        """From where the loader stands, without end."""
        return (batch for batch in self._own(0, 1) if batch is not None)

    def dealt(self, rank: int, num_ranks: int) -> Iterator[ChatBatch | None]:
        """All batches from where the loader stands, made only where they are this rank's; None for the others.

        Of every `num_ranks` the rank takes one, so no record is lost or doubled, and the place after them all is the
        same on every rank: another number of ranks goes on from it. Where every sample of a batch was skipped, an
        empty one keeps the ranks in step.
        """
        for batch in self._own(rank, num_ranks):
            side = self.encoder.config.tile_size
            mine = batch if batch is not None else collate_nothing(self.pad_id, side, self.settings.packed)
            yield from (mine if place == rank else None for place in range(num_ranks))

    def once(self) -> Iterator[ChatBatch]:
        """One epoch, whole on every rank; the loader's own place stays."""
        return (batch for batch in self._make(self._plans.epoch(0)) if batch is not None)

    def __len__(self) -> int:
        """Batches of the epoch in which the loader stands."""
        epoch = int(self._cursor["epoch"])
        if self._length[0] != epoch:
            self._length = epoch, sum(1 for _ in self._plans.epoch(epoch))
        return self._length[1]

    def sizes(self) -> list[BatchSize]:
        """Of every batch of the epoch in which the loader stands, from text and headers of media alone."""
        return [self._size(plan) for plan in self._plans.epoch(int(self._cursor["epoch"]))]

    def _is_beyond(self, counts: Int[np.ndarray, "samples 2"]) -> bool:
        """Whether a record fits no batch and will be rejected."""
        limits = (self.settings.longest, self.settings.tiles)
        return any(limit is not None and bool((counts[:, at] > limit).any()) for at, limit in enumerate(limits))

    def make(self, number: int) -> ChatBatch:
        """A batch of that epoch, out of turn: the loader's place stays."""
        made = self._work[next(islice(self._plans.epoch(int(self._cursor["epoch"])), number, None))]
        if made.batch is None or (made.rejected and self.on_error == "error"):
            raise ValueError(_sentence(made.rejected[0].source, made.rejected[0].message))
        return made.batch

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, as plain JSON, the same on every rank; and the counts of this one."""
        own = {"fingerprint": self._fingerprint, "contents": self._contents, "counts": self.ledger.state()}
        return {**self._cursor, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a state; data and settings must be those it was taken with, ranks and workers need not."""
        what = "sets, seed, batch settings, max_length and tiles"
        unlike = check_state(state, self._fingerprint, self._contents, self.changed, what)
        own = ("fingerprint", "contents", "counts")
        self._cursor = {name: value for name, value in state.items() if name not in own}
        if unlike:
            self._cursor = self._plans.refit(self._cursor)
        self.ledger, self._resumed = Ledger.of(state.get("counts", {})), True

    def describe(self, batch: ChatBatch) -> str:
        """Files and lines of a batch."""
        return ", ".join(batch.sources)

    @cached_property
    def _fingerprint(self) -> str:
        sets = [(data.annotation, len(data), data.repeat, data.max_tiles, data.augment) for data in self.sets]
        settings = (self.seed, self.shuffle, self.settings, self.encoder.max_length, self.encoder.config)
        more = "" if self.settings.room is None else repr(self.settings.packing)
        frames = self.encoder.frames
        more += "" if frames == FrameSettings() else repr(frames)  # states of before know no other
        return hashlib.sha256((repr((sets, settings)) + more).encode()).hexdigest()[:16]

    @cached_property
    def _contents(self) -> dict[str, str]:
        return contents(self.sets)

    # plans

    @cached_property
    def _counts(self) -> Int[np.ndarray, "records 2"]:
        """Tokens and tiles of every record."""
        parts = [
            measure(data, encoder, self.workers) for data, encoder in zip(self.sets, self._work.encoders, strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _own(self, rank: int, num_ranks: int) -> Iterator[ChatBatch | None]:
        """The rank's batches; the loader then stands behind those that the other ranks take with it."""
        walk = self._plans.walk(self._cursor)
        ahead: deque[tuple[Cursor, Company]] = deque()  # of the batches that workers are ahead

        def plans() -> Iterator[Plan]:
            while True:
                together = [next(walk) for _ in range(num_ranks)]
                ahead.append((together[-1][1], _company([plan for plan, _ in together])))
                yield together[rank][0]

        for batch in self._make(plans()):
            self._cursor, company = ahead.popleft()
            if batch is not None and company.ranks:
                batch = replace(batch, company=company, room=self.settings.tokens or 0)
            yield batch

    def _size(self, plan: Plan) -> BatchSize:
        counts = self._counts[plan.numbers].astype(np.int64)
        if self._is_beyond(counts):
            return BatchSize(0, 0, 0, 0, 0)
        for place, part in enumerate(plan.parts):
            if part is not None:
                counts[place] = part.tokens, part.tiles
        tokens, tiles = counts.T
        count, total = len(tokens), int(tokens.sum())
        if self.settings.packed:
            return BatchSize(count, total, total, int((tokens**2).sum()), int(tiles.sum()))
        length = int(tokens.max())
        return BatchSize(count, total, length * count, length**2 * count, int(tiles.sum()))

    # batches

    def _make(self, plans: Iterator[Plan]) -> Iterator[ChatBatch | None]:
        """The batch of each plan; None where every sample of it was skipped."""
        num_empty = 0
        for made in self._run(plans):
            if made.rejected and self.on_error == "error":
                raise ValueError(_sentence(made.rejected[0].source, made.rejected[0].message))
            self._account(made)
            num_empty = 0 if made.batch is not None else num_empty + 1
            if num_empty > len(self._mixture):
                raise ValueError(f"{num_empty} batches in a row had no usable record; the last: {made.rejected}")
            yield made.batch

    def _account(self, made: Made) -> None:
        """Count what became of the records of a batch, and set the rejected ones aside."""
        self.ledger.add(made.accepted, made.rejected)
        if not made.rejected:
            return
        for some in made.rejected:
            self.skipped[some.source] = some.message
            if self.quarantine is not None:
                self._aside = self._aside or Quarantine(self.quarantine, keep=self._resumed)
                index, position = self._mixture.locate(some.number)
                self._aside.add(some, self.sets[index].raw(position))
        last = made.rejected[-1]
        self.ledger.check(self.max_rejected, self._mixture.entries, _sentence(last.source, last.message))

    def _run(self, plans: Iterator[Plan]) -> Iterator[Made]:
        if not self.workers:
            return (self._work[plan] for plan in plans)
        loader: DataLoader[Made] = DataLoader(
            self._work,
            batch_size=None,
            sampler=plans,
            num_workers=self.workers,
            collate_fn=unchanged,
            prefetch_factor=self.prefetch,
            pin_memory=self.pin_memory,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # else the number of workers moves what dropout draws
        )
        return started(loader)


def encoder_of(encoder: Encoder, data: DataSet) -> Encoder:
    """The encoder with what the meta JSON says about a set."""
    config = encoder.config if data.max_tiles is None else replace(encoder.config, max_tiles=data.max_tiles)
    return replace(encoder, config=config, augment=encoder.augment or data.augment)


def _company(plans: Sequence[Plan]) -> Company:
    if not all(plan.tokens for plan in plans):
        return Company()
    tokens, tiles = [plan.tokens for plan in plans], [plan.tiles for plan in plans]
    return Company(len(plans), sum(tokens), sum(tiles), max(tokens), max(tiles))


def _sentence(source: str, message: str) -> str:
    return message if message.startswith(source) else f"{source}: {message}"
