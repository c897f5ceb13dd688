"""What a run of stage text has before it: its batches are made as the run will make them, from texts alone."""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from internvl.batch import TextBatch
from internvl.config import DualConfig
from internvl.data.dual_texts import DualTokeniser
from internvl.data.loader import BatchSize
from internvl.train import cost
from internvl.train.alive import Memory
from internvl.train.outlook_joint import JointOutlook, blank_texts
from internvl.train.pieces import padded_positions
from internvl.train.rehearse_others import rehearse_text
from internvl.train.run import RunConfig
from internvl.train.stages.text import check, open_texts
from internvl.train.trials import Trial, try_text


class TextOutlook(JointOutlook):
    """One form of a text, and nothing else: neither pictures nor the teacher."""

    def __init__(self, run: RunConfig, config: DualConfig, tokenizer: Any, gpus: int = 1) -> None:
        check(run)
        self.loader = open_texts(run, DualTokeniser(tokenizer, config.language))
        super().__init__(run, config, self.loader.samples, gpus, "texts")

    @cached_property
    def parts(self) -> list[Int[np.ndarray, "rows 1"]]:
        batches = islice(self.loader, len(self.loader))
        lengths = np.concatenate([batch.texts.mask.sum(1).numpy() for batch in batches])[:, None]
        return [lengths[at : at + self.rows] for at in range(0, len(lengths), self.rows)]

    def size(self, part: Int[np.ndarray, "rows 1"]) -> BatchSize:
        positions = padded_positions(part[:, 0].tolist(), self.run.pairs.micro_batch, self.samples // self.rows)
        return BatchSize(len(part), self.learned(part), positions, 0, 0)

    def learned(self, part: Int[np.ndarray, "rows 1"]) -> int:
        return int(part.sum())

    def operations(self, part: Int[np.ndarray, "rows 1"]) -> float:
        return cost.text_operations(self.run, self.config, self.size(part).positions, len(part), self.samples)

    def rehearsed(self, part: Int[np.ndarray, "rows 1"], device: str) -> Memory:
        return rehearse_text(self.run, self.config, self.blank(part), len(self.loader.english), device)

    def tried(self, part: Int[np.ndarray, "rows 1"], device: torch.device) -> Trial:
        return try_text(self.run, self.config, self.blank(part), device)

    def blank(self, part: Int[np.ndarray, "rows 1"]) -> TextBatch:
        """Texts of these lengths."""
        rows = len(part)
        first = torch.zeros(rows, dtype=torch.long)
        return TextBatch(blank_texts(part[:, 0]), first, first.bool())
