"""Tokens to text while they come: whole characters only, nothing of a stop string, no control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internvl.tokens import BOX_END, BOX_START, QUAD_END, QUAD_START, REF_END, REF_START

REGION_TOKENS = (QUAD_START, QUAD_END, REF_START, REF_END, BOX_START, BOX_END)
"""Special tokens that belong to an answer."""
UNFINISHED = "\ufffd"
"""What a tokenizer makes of the first bytes of a character."""


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Special tokens that an answer does not show."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special | set(tokenizer.all_special_ids)) - set(
        tokenizer.convert_tokens_to_ids(list(REGION_TOKENS))
    )


class Writer:
    """The text of one answer; what it gives out, joined, is `text`, without outer white space."""

    def __init__(self, tokenizer: Any, hidden: frozenset[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.hidden = hidden
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self.tokens: list[int] = []
        self.shown = self.read = 0
        """Tokens before `shown` are only there for the decoder's context; those before `read` are in `full`."""
        self.full = ""
        self.given = 0

    def add(self, token: int) -> str:
        """New text after this token, often none."""
        if self.stopped or token in self.hidden:
            return ""
        self.tokens.append(token)
        before, after = self._decode(self.shown, self.read), self._decode(self.shown)
        if after.endswith(UNFINISHED):
            return ""
        self.full += after[len(before) :]
        self.shown, self.read = self.read, len(self.tokens)
        return self._give(self._safe_end())

    def finish(self) -> str:
        """What was held back, once no more comes."""
        if not self.stopped and self.read < len(self.tokens):
            self.full += self._decode(self.shown)[len(self._decode(self.shown, self.read)) :]
        end = self._stop_at()
        self.stopped = end is not None
        return self._give(len(self.full) if end is None else end)

    @property
    def text(self) -> str:
        """Everything given so far."""
        return self.full[: self.given].lstrip()

    def _decode(self, start: int, stop: int | None = None) -> str:
        text: str = self.tokenizer.decode(
            self.tokens[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _stop_at(self) -> int | None:
        places = [at for stop in self.stops if (at := self.full.find(stop)) >= 0]
        return min(places, default=None)

    def _safe_end(self) -> int:
        """Up to here nothing can still turn into a stop string."""
        end = self._stop_at()
        if end is not None:
            self.stopped = True
            return end
        held = 0
        for stop in self.stops:
            longest = min(len(stop) - 1, len(self.full))
            held = max(held, next((n for n in range(longest, 0, -1) if self.full.endswith(stop[:n])), 0))
        return len(self.full) - held

    def _give(self, end: int) -> str:
        end = len(self.full[:end].rstrip())  # white space waits for what follows it
        if end <= self.given:
            return ""
        piece = self.full[self.given : end]
        piece = piece if self.given else piece.lstrip()
        self.given = end
        return piece
