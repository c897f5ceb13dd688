"""What a run has before it: sizes and work of every micro-batch of an epoch, the worst of them, the memory of its step.

One class a kind of stage behind one face: chat rows here, pairs, texts and pictures in outlook_pairs.py,
outlook_texts.py and outlook_pictures.py; plan_run.py makes a plan of it. Only texts and headers of media are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from internvl.batch import ChatBatch
from internvl.config import ChatConfig
from internvl.data.loader import BatchSize, Loader
from internvl.train import cost
from internvl.train.alive import Memory
from internvl.train.chat_records import open_loader
from internvl.train.rehearse import rehearse
from internvl.train.run import RunConfig
from internvl.train.trials import Trial, middling, try_chat


@dataclass(frozen=True)
class Worst:
    """A micro-batch on one device, such as the one that takes the most memory."""

    size: BatchSize
    learned: int
    sources: tuple[str, ...]


class Outlook(Protocol):
    """Of one run on some devices."""

    joint: bool
    """Every micro-batch is shared by all devices; else each is one device's alone."""

    def sizes(self) -> Sequence[BatchSize]:
        """Of every micro-batch of an epoch."""

    def work(self) -> list[float]:
        """Operations of each."""

    def worst(self) -> Worst: ...

    def memory(self, device: str) -> Memory:
        """Of a step over the worst."""

    def trial(self, device: torch.device) -> tuple[Trial, float]:
        """A pass over a middling one with random weights, and its operations."""


class ChatOutlook:
    """Rows of chat records: stage sft."""

    joint = False

    def __init__(self, run: RunConfig, config: ChatConfig, tokenizer: Any) -> None:
        self.run, self.config, self.tokenizer = run, config, tokenizer

    @cached_property
    def loader(self) -> Loader:
        return open_loader(self.run, self.tokenizer, self.config, self.run.data.meta, learning=True)

    @cached_property
    def _sizes(self) -> list[BatchSize]:
        return self.loader.sizes()

    @cached_property
    def _heaviest(self) -> int:
        return cost.heaviest(self.run, self.config, self._sizes)

    @cached_property
    def _batch(self) -> ChatBatch:
        """Made for real: labels decide where logits exist."""
        return self.loader.make(self._heaviest)

    def sizes(self) -> list[BatchSize]:
        return self._sizes

    def work(self) -> list[float]:
        share = self._batch.num_learned / self._sizes[self._heaviest].tokens
        return [cost.operations(self.run, self.config, size, round(share * size.tokens)) for size in self._sizes]

    def worst(self) -> Worst:
        return Worst(self._sizes[self._heaviest], self._batch.num_learned, self._batch.sources)

    def memory(self, device: str) -> Memory:
        return rehearse(self.run, self.config, self.tokenizer, self._batch, device)

    def trial(self, device: torch.device) -> tuple[Trial, float]:
        seen = replace(self.run, data=replace(self.run.data, features="none"))
        chosen = middling([cost.operations(seen, self.config, size, 0) for size in self._sizes])
        batch = self.loader.make(chosen)
        losses = try_chat(seen, self.config, self.tokenizer, batch, device)
        return losses, cost.operations(seen, self.config, self._sizes[chosen], batch.num_learned)
