"""Spelling of the special tokens and the label that is not learned (official internvl/train/constants.py)."""

from __future__ import annotations

from typing import Protocol

IGNORE_INDEX = -100
"""Label of a position that no loss sees."""

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_TOKEN = "<IMG_CONTEXT>"
QUAD_START, QUAD_END = "<quad>", "</quad>"
REF_START, REF_END = "<ref>", "</ref>"
BOX_START, BOX_END = "<box>", "</box>"

SPECIAL_TOKENS = (
    IMAGE_START,
    IMAGE_END,
    IMAGE_TOKEN,
    QUAD_START,
    QUAD_END,
    REF_START,
    REF_END,
    BOX_START,
    BOX_END,
)
"""In the order in which the official code adds them to a tokenizer."""


class HasVocabulary(Protocol):
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...


def token_id(tokenizer: HasVocabulary, token: str) -> int:
    """Id of `token`; ValueError where the tokenizer splits it or does not know it."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise ValueError(
            f"the tokenizer has no token {token!r}; add the special tokens with tokenizer.add_tokens first"
        )
    return vocabulary[token]


def image_tokens(num_tokens: int) -> str:
    """What one `<image>` mark becomes when its tiles take `num_tokens` positions."""
    return IMAGE_START + IMAGE_TOKEN * num_tokens + IMAGE_END
