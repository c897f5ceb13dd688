"""Micro-batches made ahead of the step that needs them, dealt to ranks. What a batch is, is the stage's business."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from internvl.parallel import collectives
from internvl.train.stage import Prepared, Stage


@dataclass(frozen=True)
class Item:
    """One prepared micro-batch, and the cursor of the data after it and those that the other ranks took with it."""

    batch: Prepared
    weights: Mapping[str, float]
    sizes: Mapping[str, int]
    names: str
    cursor: dict[str, Any]


class Feed:
    """A thread that stays two micro-batches ahead of the step; an error in it is raised by `take`."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self._stage, self._pin = stage, device.type == "cuda"
        self._batches = stage.batches()
        shared = collectives.num_ranks() > 1 and not stage.joint
        self._turn, self._turns = (collectives.rank(), collectives.num_ranks()) if shared else (0, 1)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: deque[Future[Item]] = deque()

    def __enter__(self) -> Feed:
        self._ahead.extend(self._thread.submit(self._item) for _ in range(2))
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._batches.close()

    def take(self) -> Item:
        item = self._ahead.popleft().result()
        self._ahead.append(self._thread.submit(self._item))
        return item

    def _item(self) -> Item:
        batch = [next(self._batches) for _ in range(self._turns)][self._turn]
        assert batch is not None, "a stage left out a batch of this rank"
        cursor = self._stage.cursor()
        prepared = self._stage.prepare(batch)
        return Item(
            prepared.pin_memory() if self._pin else prepared,
            self._stage.weights(batch),
            self._stage.sizes(batch),
            self._stage.describe(batch),
            cursor,
        )
