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


class PictureStage(ABC, Generic[B]):
    """Pictures in a new order each epoch, `size` at a time; a last, smaller batch is left out."""

    joint = False

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.size = run.data.batch_samples or 16
        self.epoch, self.place = 0, 0

    @abstractmethod
    def num_pictures(self) -> int:
        """Of an epoch."""

    @abstractmethod
    def made(self, chosen: Sequence[int], drawn: np.random.Generator) -> B:
        """The batch of these pictures, by number; what is random about it comes from the generator."""

    def batches(self) -> Generator[B, None, None]:
        if self.size > self.num_pictures():
            raise ValueError(
                f"data.batch_samples is {self.size} but there are {self.num_pictures()} pictures; lower it"
            )
        while True:
            order = np.random.default_rng((self.run.seed, self.epoch)).permutation(self.num_pictures())
            while self.place + self.size <= len(order):
                chosen = order[self.place : self.place + self.size].tolist()
                self.place += self.size
                yield self.made(chosen, np.random.default_rng((self.run.seed, self.epoch, self.place)))
            self.epoch, self.place = self.epoch + 1, 0

    def cursor(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self.epoch, self.place = int(cursor["epoch"]), int(cursor["place"])

    def batches_per_epoch(self) -> int:
        return max(1, self.num_pictures() // self.size)

    def describe(self, batch: B) -> str:
        return ", ".join(batch.sources)

    def lost(self) -> tuple[int, Mapping[str, str]]:
        return 0, {}

    @abstractmethod
    def export(self, learner: Learner[Any], out: Path) -> None:
        """The model with what it learned; what was only there to teach it stays in the checkpoints."""
