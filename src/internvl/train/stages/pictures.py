"""What the stages that learn from single pictures share: their order, the place in it, what a run leaves.

Which pictures, and what becomes of some of them, is a stage's: align.py, distill.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from internvl.train.run import RunConfig
from internvl.train.trainable import Learner


class Named(Protocol):
    """A batch that knows its pictures."""

    @property
    def sources(self) -> tuple[str, ...]: ...


B = TypeVar("B", bound=Named)


def shuffled(num_pictures: int, seed: int, epoch: int) -> list[int]:
    """Each picture once."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(num_pictures).tolist()
    return order


class PictureStage(ABC, Generic[B]):
    """Pictures in a new order each epoch, `size` at a time; a last, smaller batch is left out."""

    joint = False

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.size = run.data.batch_samples or 16
        self.epoch, self.place = 0, 0

    @abstractmethod
    def num_pictures(self) -> int:
        """That there are, each counted once."""

    @abstractmethod
    def made(self, chosen: Sequence[int], drawn: np.random.Generator) -> B:
        """The batch of these pictures, by number; what is random about it comes from the generator."""

    def order(self, epoch: int) -> list[int]:
        """Numbers of the pictures of an epoch."""
        return shuffled(self.num_pictures(), self.run.seed, epoch)

    def batches(self) -> Generator[B, None, None]:
        while True:
            order = self.order(self.epoch)
            if self.size > len(order):
                raise ValueError(f"data.batch_samples is {self.size} but an epoch has {len(order)} pictures; lower it")
            while self.place + self.size <= len(order):
                chosen = order[self.place : self.place + self.size]
                self.place += self.size
                yield self.made(chosen, np.random.default_rng((self.run.seed, self.epoch, self.place)))
            self.epoch, self.place = self.epoch + 1, 0

    def cursor(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self.epoch, self.place = int(cursor["epoch"]), int(cursor["place"])

    def batches_per_epoch(self) -> int:
        return max(1, len(self.order(0)) // self.size)

    def describe(self, batch: B) -> str:
        return ", ".join(batch.sources)

    def lost(self) -> tuple[int, Mapping[str, str]]:
        return 0, {}

    @abstractmethod
    def export(self, learner: Learner[Any], out: Path) -> None:
        """The model with what it learned; what was only there to teach it stays in the checkpoints."""
