"""Held-out records answered during a run, beside the answers that were expected: what a loss does not show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from internvl.batch import ChatBatch
from internvl.parallel import collectives
from internvl.tokens import IGNORE_INDEX
from internvl.train.stages.sft import Sft


@dataclass(frozen=True)
class Question:
    """A held-out sample up to its first learned token, and what follows it there."""

    source: str
    ids: Int[Tensor, "1 length"]
    tiles: UInt8[Tensor, "tiles 3 side side"]
    expected: list[int]


class Answers:
    """An evaluator: the first `count` held-out samples, answered greedily."""

    def __init__(self, stage: Sft, count: int, num_tokens: int) -> None:
        if stage.held_out is None:
            raise ValueError(f"watch.samples is {count} but there are no held-out records; set --data.held-out")
        self.stage, self.count, self.num_tokens = stage, count, num_tokens

    def __call__(self, device: torch.device) -> dict[str, Any]:
        stage, tokenizer = self.stage, self.stage.tokenizer
        assert stage.held_out is not None
        settings = stage.image_token_id, stage.model.config.tokens_per_tile
        asked = (question for batch in stage.held_out.once() for question in questions(batch, *settings))
        lines = []
        for question in islice(asked, self.count):
            words = [
                tokenizer.decode(ids, skip_special_tokens=True)
                for ids in (question.expected, self._answer(question, device))
            ]
            lines.append({"source": question.source, "expected": words[0], "answer": words[1]})
        return {"samples": lines}

    def _answer(self, question: Question, device: torch.device) -> list[int]:
        from transformers import DynamicCache

        model, ids = self.stage.model, question.ids.to(device)
        several = collectives.num_ranks() > 1
        cache = DynamicCache()
        hidden = model.hidden(
            ids,
            visual=self.stage.see(question.tiles.to(device)) if len(question.tiles) or several else None,
            num_image_tokens=int((question.ids == self.stage.image_token_id).sum()),
            cache=cache,
        )
        found: list[int] = []
        stop = {self.stage.tokenizer.eos_token_id, question.expected[-1]}
        for _ in range(self.num_tokens):
            token = model.language.head(hidden[:, -1]).argmax(-1)
            found.append(int(token))
            if found[-1] in stop and not several:  # ranks go on together, to the same number of tokens
                break
            hidden = model.hidden(token[None], cache=cache)
        ends = [place for place, token in enumerate(found) if token in stop]
        return found[: ends[0]] if ends else found


def questions(batch: ChatBatch, image_token_id: int, tokens_per_tile: int) -> Iterator[Question]:
    """The samples of a batch that have a learned token, padded or packed."""
    length = batch.input_ids.shape[1]
    if batch.segments is None:
        spans = [(row, 0, length) for row in range(batch.num_samples)]
    else:
        spans = [(0, first, end) for first, end in pairwise(batch.segments.tolist())][: batch.num_samples]
    seen = 0
    for number, (row, first, end) in enumerate(spans):
        ids, labels = batch.input_ids[row, first:end], batch.labels[row, first:end].tolist()
        begin = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        stop = next((place for place in range(begin, len(labels)) if labels[place] == IGNORE_INDEX), len(labels))
        num_tiles = int((ids[:begin] == image_token_id).sum()) // tokens_per_tile
        if begin and begin < len(labels):
            source = batch.sources[number] if batch.sources else ""
            yield Question(source, ids[None, :begin], batch.tiles[seen : seen + num_tiles], labels[begin:stop])
        seen += int((ids == image_token_id).sum()) // tokens_per_tile
