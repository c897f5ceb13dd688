"""Short answers: what counts as the same, exact match, and containment of a name. Text alone; no model, no files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # kana, Han, Hangul: no spaces between words


def same_case(text: str) -> str:
    """NFKC and single spaces; case and punctuation stay."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def normalise(text: str) -> str:
    """What exact match compares: case folded, one final period and the articles a, an, the removed.

    An answer that is nothing but an article ("A") keeps it.
    """
    folded = same_case(text).casefold().removesuffix(".").strip()
    return " ".join(_ARTICLES.sub(" ", folded).split()) or folded


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    return normalise(answer) in {normalise(one) for one in accepted}


def verbatim_match(answer: str, accepted: Sequence[str], ignore_case: bool = False) -> bool:
    """As written: case and punctuation count; only outer and repeated spaces do not."""
    fold = str.casefold if ignore_case else str
    return fold(same_case(answer)) in {fold(same_case(one)) for one in accepted}


def contains(answer: str, accepted: Sequence[str]) -> bool:
    """An accepted name stands in the answer as whole words; case, hyphens and underscores do not matter.

    Names in scripts without spaces are looked for as they are.
    """
    spoken = _spoken(answer)
    return any(_stands_in(_spoken(name), spoken) for name in accepted)


def _spoken(text: str) -> str:
    return " ".join(re.sub(r"[-_]", " ", same_case(text).casefold()).split())


def _stands_in(name: str, text: str) -> bool:
    if not name:
        return False
    if _UNSPACED.search(name):
        return name in text
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
