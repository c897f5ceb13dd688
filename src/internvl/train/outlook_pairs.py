"""What a run on pictures with captions has before it: stages contrastive and generative, gradient caching included."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from internvl.batch import PairBatch
from internvl.config import DualConfig
from internvl.data.captions import clean_caption
from internvl.data.dual_texts import CAPTION_PROMPT, TEXT_PREFIX, DualTokeniser
from internvl.data.loader import BatchSize
from internvl.tokens import IGNORE_INDEX
from internvl.train import cost
from internvl.train.alive import Memory
from internvl.train.outlook_joint import JointOutlook, blank_texts
from internvl.train.rehearse_others import rehearse_pairs
from internvl.train.run import RunConfig
from internvl.train.stages.pairs import check, open_pairs
from internvl.train.trials import Trial, try_pairs


class PairOutlook(JointOutlook):
    """Three forms of a text: to embed, to match, as captions; `forms` of them are read."""

    def __init__(self, run: RunConfig, config: DualConfig, tokenizer: Any, gpus: int = 1) -> None:
        check(run)
        generative = run.stage == "generative"
        self.clean = generative and run.pairs.losses == "retrieval"
        """Captions are read after the clean-up; as captions they are not."""
        self.forms = 1 if not generative else 2 if self.clean else 3
        self.words = DualTokeniser(tokenizer, config.language)
        self.loader = open_pairs(run, config, self.words, "all" if generative else "contrast")
        self.side = self.loader.encoder.settings.side
        config = replace(config, generative=True) if generative else config
        super().__init__(run, config, self.loader.samples, gpus, "pairs")

    @cached_property
    def lengths(self) -> Int[np.ndarray, "records 3"]:
        """Most tokens of each record's texts; a record without a text has none."""
        found: list[list[int]] = []
        for number in range(self.loader.num_records):
            try:
                texts = self.loader.pair(number).captions
            except ValueError:  # its own turn tells it
                found.append([1, 1, 1])
                continue
            plain = max((clean_caption(text) if self.clean else text for text in texts), key=len)
            rows = (self.words.row(TEXT_PREFIX + plain), self.words.row(plain), self.words.caption(plain)[0])
            found.append([len(row.ids) for row in rows])
        return np.array(found)

    @cached_property
    def parts(self) -> list[Int[np.ndarray, "rows 3"]]:
        numbers = self.loader.numbers(len(self.loader) * self.samples)
        return [self.lengths[numbers[at : at + self.rows]] for at in range(0, len(numbers), self.rows)]

    def rehearsed(self, part: Int[np.ndarray, "rows 3"], device: str) -> Memory:
        return rehearse_pairs(self.run, self.config, self.blank(part), self.side, device)

    def tried(self, part: Int[np.ndarray, "rows 3"], device: torch.device) -> Trial:
        pixels = torch.zeros(len(part), 3, self.side, self.side, dtype=torch.uint8)
        return try_pairs(self.run, self.config, replace(self.blank(part), pixels=pixels), device)

    def blank(self, part: Int[np.ndarray, "rows 3"]) -> PairBatch:
        """Texts of these lengths, without pictures."""
        contrast, match, caption = (blank_texts(lengths) for lengths in part.T)
        whole, rows = self.run.stage == "generative", len(part)
        settings = self.loader.encoder.settings
        kept = torch.arange(settings.num_kept).expand(rows, -1) if settings.mask_share else None
        labels = caption.ids.masked_fill(~caption.mask, IGNORE_INDEX)
        labels[:, : self._prompt] = IGNORE_INDEX
        return PairBatch(
            pixels=torch.empty(0, 3, self.side, self.side, dtype=torch.uint8),
            contrast=contrast,
            same=torch.arange(rows),
            valid=torch.ones(rows, dtype=torch.bool),
            kept=kept,
            match=match if whole else None,
            negatives=match if whole and self.loader.negatives else None,
            caption=caption if whole else None,
            labels=labels if whole else None,
        )

    @cached_property
    def _prompt(self) -> int:
        """Tokens of a caption that are not learned."""
        return len(self.words.row(CAPTION_PROMPT, end=False).ids) - 1

    def learned(self, part: Int[np.ndarray, "rows 3"]) -> int:
        return int((part[:, 2] - self._prompt).sum()) if self.forms == 3 else int(part[:, 0].sum())

    def size(self, part: Int[np.ndarray, "rows 3"]) -> BatchSize:
        used = part[:, : self.forms]
        return BatchSize(len(part), int(used.sum()), len(part) * int(used.max(0).sum()), 0, len(part))

    def operations(self, part: Int[np.ndarray, "rows 3"]) -> float:
        settings, rows = self.loader.encoder.settings, len(part)
        contrast, match, caption = (
            rows * int(longest) if form < self.forms else 0 for form, longest in enumerate(part.max(0))
        )
        learned = self.learned(part) if self.forms == 3 else 0
        shown = (settings.num_patches + 1, settings.num_kept + 1)
        size = cost.PairSize(rows, *shown, contrast, match, caption, learned)
        return cost.pair_operations(self.run, self.config, size, rows)
