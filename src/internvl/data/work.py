"""What a worker process of the loader does: a plan in, a batch out, and what became of each record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from torch.utils.data import Dataset

from internvl.batch import ChatBatch
from internvl.data.batching import BatchSettings
from internvl.data.collate import collate, collate_packed
from internvl.data.encode import Encoder
from internvl.data.ledger import Rejection
from internvl.data.mixture import Mixture
from internvl.data.plans import Plan
from internvl.data.records import RecordError, printable, reason_of
from internvl.data.sample import Sample
from internvl.data.splitting import Layout, Segment
from internvl.tokens import IGNORE_INDEX


class Made(NamedTuple):
    batch: ChatBatch | None
    accepted: list[tuple[str, bool]] = []  # noqa: RUF012 -- never written to
    """Set of each record, and whether it was cut; once for a record of several parts."""
    rejected: list[Rejection] = []  # noqa: RUF012


@dataclass
class Work(Dataset[Made]):
    """What a worker process holds: plans in, batches out."""

    mixture: Mixture
    encoders: list[Encoder]
    settings: BatchSettings
    pad_id: int
    skips: bool

    def __getitem__(self, plan: Plan) -> Made:
        samples: list[Sample] = []
        accepted: list[tuple[str, bool]] = []
        rejected: list[Rejection] = []
        parts = plan.parts or [None] * len(plan.places)
        for place, number, part in zip(plan.places.tolist(), plan.numbers.tolist(), parts, strict=True):
            try:
                sample = self._sample(number, self._rng(plan.epoch, place))
                taken = sample if part is None else sample.part(part)
            except (ValueError, OSError) as error:
                learned = self.layout(number, plan.epoch, place).learned
                rejected.append(self._rejection(number, error, is_first(part, learned)))
                if not self.skips:
                    return Made(None, rejected=rejected)
            else:
                samples.append(taken)
                if is_first(part, sample.labels.numpy() != IGNORE_INDEX):
                    accepted.append((self._name(number), sample.num_cut > 0))
        if not samples:
            return Made(None, rejected=rejected)
        join = collate_packed if self.settings.packed else collate
        return Made(join(samples, self.pad_id, self.settings.weighting), accepted, rejected)

    def _name(self, number: int) -> str:
        data = self.mixture.sets[self.mixture.locate(number)[0]]
        return data.name or data.annotation

    def _rejection(self, number: int, error: ValueError | OSError, counts: bool) -> Rejection:
        source = self.mixture.source(number)
        return Rejection(number, self._name(number), source, reason_of(error), printable(error), counts)

    def layout(self, number: int, epoch: int, place: int) -> Layout:
        """Where pictures and learned tokens of a record are; of one that cannot be used, nothing."""
        index, position = self.mixture.locate(number)
        try:
            return self.encoders[index].layout(self.mixture.sets[index].record(position), self._rng(epoch, place))
        except (ValueError, OSError):  # making its sample will say why
            return Layout((), np.zeros(0, bool))

    def _rng(self, epoch: int, place: int) -> np.random.Generator:
        return np.random.default_rng([self.mixture.seed, epoch, place])

    def _sample(self, number: int, rng: np.random.Generator) -> Sample:
        index, position = self.mixture.locate(number)
        sample = self.encoders[index].encode(self.mixture.sets[index].record(position), rng)
        check_sample(sample, self.settings)
        return sample


def is_first(part: Segment | None, learned: Bool[np.ndarray, " length"]) -> bool:
    """Whether no part before this one learns anything, which splitting.py would then have left out."""
    return part is None or not learned[1 : part.start + 1].any()


def check_sample(sample: Sample, settings: BatchSettings) -> None:
    """Refuse what no batch may hold."""
    sizes = (("tokens", len(sample.input_ids), settings.longest), ("tiles", sample.num_tiles, settings.tiles))
    for noun, value, limit in sizes:
        if limit is not None and value > limit:
            said = f"{value} {noun}; a batch may have {limit}; raise it or lower max_tiles"
            raise RecordError("budget", f"{sample.source}: {said}")
