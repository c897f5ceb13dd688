"""Texts as InternVL-C and -G read them: prefix, begin and end of text, 80 tokens, padding by id 0.

Prefixes are part of what the released models learned: a text without them silently gives other vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from internvl.batch import Texts
from internvl.config import LanguageConfig
from internvl.data.captions import MAX_TOKENS, check_unicode
from internvl.tokens import IGNORE_INDEX

TEXT_PREFIX = "summarize:"
"""Before every text to embed, without a space (official clip_benchmark/.../internvl_huggingface/__init__.py)."""
CAPTION_PROMPT = "English caption:"
"""Official internvl_g/eval/evaluate_caption.py; the training data of internvl_g has it before every language."""


class Row(NamedTuple):
    """Ids of one text, and whether its end was cut off."""

    ids: list[int]
    is_cut: bool


@dataclass(frozen=True)
class DualTokeniser:
    """A tokenizer of transformers, with the begin and end of text that the language model's config names."""

    tokenizer: Any
    language: LanguageConfig

    def row(self, text: str, end: bool = True, room: int = MAX_TOKENS) -> Row:
        """Begin of text, text, end of text: at most `room` tokens. ValueError for what is no Unicode."""
        check_unicode(text)
        ending = self._control("eos_token_id") if end else []
        beginning = self._control("bos_token_id")
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        room -= len(beginning) + len(ending)
        return Row([*beginning, *ids[:room], *ending], len(ids) > room)

    def caption(self, text: str) -> tuple[Row, list[int]]:
        """The prompt, the text, its end; and the labels: the last piece of the prompt is learned too, what comes
        before is not. Prompt and text are cut into pieces apart (official internvl_g/internvl/train/dataset.py)."""
        prompt = self.row(CAPTION_PROMPT, end=False).ids
        beginning = len(self._control("bos_token_id"))
        content = self.row(text, room=MAX_TOKENS - len(prompt) + beginning)
        ids = [*prompt, *content.ids[beginning:]]
        learned = len(prompt) - 1
        return Row(ids, content.is_cut), [IGNORE_INDEX] * learned + ids[learned:]

    def _control(self, name: str) -> list[int]:
        number = self.language.settings.get(name)
        return [] if number is None else [int(number)]


def pad(rows: Sequence[Sequence[int]]) -> Texts:
    """Rows as one tensor, 0 on the right, and where they are real."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Texts(ids, torch.arange(longest) < lengths[:, None])
