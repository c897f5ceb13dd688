"""Pieces of a rendered conversation -> token ids, and which of them are learned.

The whole string is tokenised at once and labels follow from character offsets: no lengths are counted twice.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from internvl.data.templates import Piece
from internvl.tokens import (
    BOX_END,
    BOX_START,
    IGNORE_INDEX,
    IMAGE_END,
    IMAGE_MARK,
    IMAGE_START,
    IMAGE_TOKEN,
    QUAD_END,
    QUAD_START,
    REF_END,
    REF_START,
    image_tokens,
    token_id,
)

_WRITABLE = {QUAD_START, QUAD_END, REF_START, REF_END, BOX_START, BOX_END}
"""Special tokens that people and models may write in a text."""


class Tokens(NamedTuple):
    """A tokenised conversation in which every picture is still one token."""

    ids: Int[np.ndarray, " length"]
    learned: Bool[np.ndarray, " length"]
    image_at: Int[np.ndarray, " images"]
    """Where the one token of each picture stands."""


class Tokeniser:
    """A tokenizer of transformers, read through its Rust core; changes nothing, pickles, forks.

    `marks`: `<img>` and `</img>` stand around a picture; without them (1.0) its one token stands alone.
    """

    def __init__(self, tokenizer: Any, marks: bool = True) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer (tokenizer.json)"
            )
        self.image_token_id = token_id(tokenizer, IMAGE_TOKEN)
        self._one_image = image_tokens(1) if marks else IMAGE_TOKEN
        # A copy: transformers leaves the truncation of its last call in the original.
        self._core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._core.no_truncation()
        self._core.no_padding()
        self._prefix = self._find_prefix()
        known = tokenizer.added_tokens_decoder.values()
        names = {token.content for token in known if token.special} | {IMAGE_START, IMAGE_END, IMAGE_TOKEN}
        longest_first = sorted(names - _WRITABLE, key=len, reverse=True)
        self._reserved = re.compile("|".join(re.escape(name) for name in longest_first))

    def _find_prefix(self) -> list[int]:
        """What the tokenizer puts before any text by itself: BOS, or nothing."""
        bare, full = self._core.encode("a", add_special_tokens=False).ids, self._core.encode("a").ids
        starts = (at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare)
        return full[: next(starts, 0)]

    @cached_property
    def _plain_core(self) -> Tokenizer:
        """Reads special tokens as ordinary text."""
        core = Tokenizer.from_str(self._core.to_str())
        core.encode_special_tokens = True
        return core

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that make the same ids."""
        return hashlib.sha256(self._core.to_str().encode()).hexdigest()

    def __call__(self, pieces: Iterable[Piece]) -> Tokens:
        """Ids of the joined pieces, BOS first where the tokenizer has one."""
        ids, learned = list(self._prefix), [False] * len(self._prefix)
        for text, spans, is_plain in self._runs(pieces):
            encoding = (self._plain_core if is_plain else self._core).encode(text, add_special_tokens=False)
            flags = [False] * len(encoding.ids)
            starts = [start for start, _ in encoding.offsets] if spans else []
            for first, last in spans:
                begin, end = bisect_left(starts, first), bisect_left(starts, last)
                flags[begin:end] = [True] * (end - begin)
            ids += encoding.ids
            learned += flags
        array = np.asarray(ids, np.int64)
        return Tokens(array, np.asarray(learned, bool), np.flatnonzero(array == self.image_token_id))

    def _runs(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, list[tuple[int, int]], bool]]:
        """Runs of text with their learned spans; a special token that someone wrote is a run of its own, plain.

        So is each letter of what is spelled.
        """
        text: str = ""
        spans: list[tuple[int, int]] = []
        for piece in pieces:
            for part, is_plain in self._split(piece) if not piece.spelled else self._letters(piece):
                if is_plain:
                    if text:
                        yield text, spans, False
                    yield part, [(0, len(part))] if piece.learned else [], True
                    text, spans = "", []
                    continue
                if piece.learned:
                    spans.append((len(text), len(text) + len(part)))
                text += part
        if text:
            yield text, spans, False

    def _letters(self, piece: Piece) -> Iterator[tuple[str, bool]]:
        if not self._can_spell:
            raise ValueError(
                "the record is `spelled`, but this tokenizer puts spaces between letters that are tokens of their own: "
                "its answer would not read as written; remove `spelled`"
            )
        for letter in piece.text:
            yield letter, True

    @cached_property
    def _can_spell(self) -> bool:
        """Whether texts tokenised letter by letter are decoded to what they were."""
        ids = [number for letter in "a bC" for number in self._plain_core.encode(letter, add_special_tokens=False).ids]
        return bool(self._core.decode(ids) == "a bC")

    def _split(self, piece: Piece) -> Iterator[tuple[str, bool]]:
        if not piece.is_content:
            yield piece.text, False
            return
        at = 0
        for match in self._reserved.finditer(piece.text):
            yield self._marked(piece.text[at : match.start()], piece), False
            yield match.group(), True
            at = match.end()
        yield self._marked(piece.text[at:], piece), False

    def _marked(self, text: str, piece: Piece) -> str:
        return text.replace(IMAGE_MARK, self._one_image) if piece.takes_images else text


@lru_cache(maxsize=8)
def tokeniser_of(tokenizer: Any, num_tokens: int, marks: bool = True) -> Tokeniser:
    """The one reader of a tokenizer of this size: making it copies the vocabulary."""
    return Tokeniser(tokenizer, marks)


def expand(
    tokens: Tokens, image_lengths: Sequence[int]
) -> tuple[Int[np.ndarray, " longer"], Int[np.ndarray, " longer"]]:
    """Ids and labels with each picture's token repeated as often as its tiles need."""
    if len(image_lengths) != len(tokens.image_at):
        raise ValueError(f"{len(tokens.image_at)} {IMAGE_MARK} marks but {len(image_lengths)} images; make them equal")
    labels = np.where(tokens.learned, tokens.ids, IGNORE_INDEX)
    if not image_lengths:
        return tokens.ids, labels
    repeats = np.ones(len(tokens.ids), np.int64)
    repeats[tokens.image_at] = image_lengths
    return np.repeat(tokens.ids, repeats), np.repeat(labels, repeats)
