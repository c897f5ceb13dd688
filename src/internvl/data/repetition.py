"""Does a text repeat itself? Shares and lengths, linear in the text; what is too much, the callers say.

Paper 2.5, section 4.3: some thousands of records that repeat themselves teach a model to loop without end.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
"""Words between spaces; of scripts without spaces, characters."""
_PERIODS = 64
"""Longest unit in characters that `longest_stretch` looks for; longer ones are n-grams or lines."""
_LONGEST = 100_000
"""Characters of a text that are looked at."""


@dataclass(frozen=True)
class Bounds:
    """From where on a text repeats itself."""

    ngram: int = 10
    """Words of an n-gram (official code, dataset.py)."""
    ngrams: float = 0.4
    """Largest share of distinct n-grams that occur more than once (official code, dataset.py)."""
    lines: float = 0.5
    """Largest share of repeated lines (paper 2.5, section 4.3, names the rule and no number)."""
    min_lines: int = 6
    """Lines that a text needs before they are looked at."""
    stretch: int = 100
    """Longest stretch of one repeated unit, in characters (paper 2.5: "long runs of zeros", without a number)."""

    def complaint(self, text: str) -> str:
        """What is too much in a text; nothing where it is sound."""
        text = text[:_LONGEST]
        length, unit = longest_stretch(text) if len(text) > self.stretch else (0, "")
        if length > self.stretch:
            return f"{unit!r} again and again over {length} characters; the limit is {self.stretch}"
        share = repeated_lines(text, self.min_lines)
        if share > self.lines:
            return f"{share:.0%} of its lines repeat an earlier one; the limit is {self.lines:.0%}"
        share = repeated_ngrams(text, self.ngram)
        if share > self.ngrams:
            return f"{share:.0%} of its {self.ngram}-grams occur more than once; the limit is {self.ngrams:.0%}"
        return ""


def repeated_ngrams(text: str, ngram: int = 10) -> float:
    """Share of the distinct n-grams of words that occur more than once; 0 for fewer words than one n-gram."""
    words = _WORD.findall(text)
    counts = Counter(zip(*(words[start:] for start in range(ngram)), strict=False))
    return sum(count > 1 for count in counts.values()) / len(counts) if counts else 0.0


def repeated_lines(text: str, min_lines: int = 1) -> float:
    """Share of the lines with words that say what an earlier one said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if len(lines) >= max(1, min_lines) else 0.0


def longest_stretch(text: str) -> tuple[int, str]:
    """Characters of the longest stretch of a unit (up to 64 characters) that comes at least twice, and the unit."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    best, unit = 0, ""
    for period in range(1, min(_PERIODS, len(codes) // 2) + 1):
        differs = np.flatnonzero(codes[period:] != codes[:-period])
        edges = np.concatenate([[-1], differs, [len(codes) - period]])
        runs = np.diff(edges) - 1
        at = int(runs.argmax())
        length = int(runs[at]) + period
        if runs[at] >= period and length > best:
            start = int(edges[at]) + 1
            best, unit = length, text[start : start + period]
    return best, unit
