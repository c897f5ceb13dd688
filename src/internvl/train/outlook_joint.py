"""What a run on joint batches has before it: every device has a part of each. Stages of dual models.

What a part holds, and what it costs, is outlook_pairs.py's and outlook_texts.py's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from internvl.batch import Texts
from internvl.config import DualConfig
from internvl.data.dealing import part_of
from internvl.data.loader import BatchSize
from internvl.train.alive import Memory
from internvl.train.outlook import Worst
from internvl.train.run import RunConfig
from internvl.train.trials import Trial, middling


class JointOutlook(ABC):
    """A part is known by the lengths of its texts, one column for each of their forms."""

    joint = True

    def __init__(self, run: RunConfig, config: DualConfig, samples: int, gpus: int, what: str) -> None:
        self.run, self.config, self.samples = run, config, samples
        self.rows = part_of(samples, gpus, what, "GPUs")

    @cached_property
    @abstractmethod
    def parts(self) -> list[Int[np.ndarray, "rows forms"]]:
        """Text lengths of every device's part of every batch of an epoch, in order."""

    @abstractmethod
    def size(self, part: Int[np.ndarray, "rows forms"]) -> BatchSize: ...

    @abstractmethod
    def learned(self, part: Int[np.ndarray, "rows forms"]) -> int:
        """Positions from which something is learned."""

    @abstractmethod
    def operations(self, part: Int[np.ndarray, "rows forms"]) -> float: ...

    @abstractmethod
    def rehearsed(self, part: Int[np.ndarray, "rows forms"], device: str) -> Memory:
        """Memory of a step over it."""

    @abstractmethod
    def tried(self, part: Int[np.ndarray, "rows forms"], device: torch.device) -> Trial:
        """A pass over it with random weights."""

    def sizes(self) -> list[BatchSize]:
        return [_sum([self.size(part) for part in parts]) for parts in self._steps()]

    def work(self) -> list[float]:
        return [sum(self.operations(part) for part in parts) for parts in self._steps()]

    def worst(self) -> Worst:
        part = self._worst
        return Worst(self.size(part), self.learned(part), ())

    def memory(self, device: str) -> Memory:
        return self.rehearsed(self._worst, device)

    def trial(self, device: torch.device) -> tuple[Trial, float]:
        work = [self.operations(part) for part in self.parts]
        chosen = middling(work)
        return self.tried(self.parts[chosen], device), work[chosen]

    @cached_property
    def _worst(self) -> Int[np.ndarray, "rows forms"]:
        return max(self.parts, key=lambda part: self.size(part).positions)

    def _steps(self) -> Iterator[list[Int[np.ndarray, "rows forms"]]]:
        count = self.samples // self.rows
        return (self.parts[at : at + count] for at in range(0, len(self.parts), count))


def blank_texts(lengths: Int[np.ndarray, " rows"]) -> Texts:
    """Texts of these lengths, which say nothing."""
    mask: Tensor = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
    return Texts(mask.long(), mask)


def _sum(sizes: Sequence[BatchSize]) -> BatchSize:
    return BatchSize(*(sum(values) for values in zip(*sizes, strict=True)))
