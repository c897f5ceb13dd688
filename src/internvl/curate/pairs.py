"""Which pairs of picture and caption are worth learning from: one rule after the other, each with its reason.

Paper 1.0, appendix A.4, names the filters (fit of picture and text, resolution, length of the caption, duplicates of
the evaluation sets) but not their limits: those here are DataComp's basic filter (arXiv 2304.14108, section 3.2 and
appendix). Writing files is pair_sets.py's.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from internvl.curate.duplicates import Looks, look
from internvl.data.image_text import Pair
from internvl.data.images import open_image

REASONS = {
    "unreadable": "the line is no pair, or its picture cannot be opened",
    "small": "the shorter side of the picture is below least_side",
    "long_shape": "one side is more than most_ratio times the other",
    "language": "not one of languages, or the line does not say which",
    "short": "every caption has fewer than least_words words or least_letters letters",
    "long": "every caption has more than most_words words",
    "unlike": "no caption fits the picture: similarity below least_similarity",
    "exact": "the same picture with the same caption came before",
    "near": "a picture that looks the same came before",
    "held_out": "it looks like a picture of the sets given as against",
}
_CHINESE = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_WORD = re.compile(rf"[{_CHINESE}]|[{_UNSPACED}]{{1,4}}|[^\s\u0f0b{_CHINESE}{_UNSPACED}]+")
"""What spaces part (in Tibetan, points). Each sign of Chinese and Japanese, which write none, is a word; so are four
signs of Thai, Lao, Burmese and Khmer, whose words have about as many."""


def num_words(caption: str) -> int:
    """In any script."""
    return len(_WORD.findall(caption))


def num_letters(caption: str) -> int:
    """Signs, spaces too; a wide one (Chinese, Japanese, Korean) says as much as two letters."""
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in caption)


@dataclass(frozen=True)
class PairRules:
    """Limits; a pair that breaks one goes."""

    least_side: int = 200
    """Pixels of the shorter side."""
    most_ratio: float = 3.0
    """Longer side over shorter side."""
    least_words: int = 3
    """Chinese and Japanese signs count one each, four of Thai, Lao, Burmese and Khmer one together."""
    least_letters: int = 6
    """Chinese, Japanese and Korean signs count two each."""
    most_words: int | None = None
    languages: tuple[str, ...] = ()
    """As the lines name them; any, also none, when empty."""
    least_similarity: float | None = None
    """Cosine of the vectors of picture and caption; needs vectors."""
    near: int | None = 3
    """Bits of 64 by which the look of a near duplicate may differ; None leaves near duplicates in."""

    def __post_init__(self) -> None:
        for name in ("least_side", "least_words", "least_letters"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0, which lets all pass")
        if self.most_ratio < 1:
            raise ValueError(f"most_ratio is {self.most_ratio}; it is longer over shorter side, so at least 1")
        if self.least_similarity is not None and not -1 <= self.least_similarity <= 1:
            raise ValueError(f"least_similarity is {self.least_similarity}; a cosine is between -1 and 1")
        if self.most_words is not None and self.most_words < self.least_words:
            raise ValueError(f"most_words is {self.most_words}, below least_words {self.least_words}; raise it")


class Verdict(NamedTuple):
    """The captions that stay; none, and the reason, where the pair goes."""

    captions: tuple[str, ...]
    reason: str = ""
    like: str = ""
    """The pair that was there before, of duplicates."""


class PairFilter:
    """Rules, and the pictures that came before."""

    def __init__(self, rules: PairRules) -> None:
        self.rules = rules
        self._looks, self._held_out = Looks(rules.near or 0), Looks(rules.near or 0)
        self._pictures: dict[bytes, str] = {}
        """Content of kept pictures -> where they stood first."""
        self._pairs: dict[tuple[bytes, str], str] = {}

    def hold_out(self, pair: Pair) -> None:
        """Pictures that look like this pair's go. ValueError where it cannot be opened: it could not be kept out."""
        try:
            image = open_image(Path(pair.path))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{pair.source}: {error}; what cannot be seen cannot be held out: repair or remove the line"
            ) from error
        self._held_out.add(look(image), pair.path)

    def judge(self, pair: Pair, similarities: Sequence[float] | None = None) -> Verdict:
        """`similarities`: of each caption with the picture. ValueError and OSError where it cannot be opened."""
        content = Path(pair.path).read_bytes()
        try:
            image = open_image(content)
        except ValueError as error:
            raise ValueError(f"{pair.path}: {error}") from error
        if reason := self._shape(image.size):
            return Verdict((), reason)
        verdict = self._texts(pair, similarities)
        if verdict.reason:
            return verdict
        digest = hashlib.blake2b(content, digest_size=16).digest()
        verdict = self._once(digest, verdict.captions)
        if not verdict.reason and digest not in self._pictures:
            seen = look(image)
            for reason, looks in (("held_out", self._held_out), ("near", self._looks)):
                if (like := looks.find(seen)) is not None:
                    return Verdict((), reason, like)
            if self.rules.near is not None:
                self._looks.add(seen, pair.source)
        return self._keep(digest, verdict, pair.source)

    def _shape(self, size: tuple[int, int]) -> str:
        shorter, longer = sorted(size)
        if shorter < self.rules.least_side:
            return "small"
        return "long_shape" if longer > self.rules.most_ratio * shorter else ""

    def _texts(self, pair: Pair, similarities: Sequence[float] | None) -> Verdict:
        rules = self.rules
        if rules.languages and pair.language not in rules.languages:
            return Verdict((), "language")
        if rules.least_similarity is not None and similarities is None:
            raise ValueError("least_similarity is set but there are no vectors; give --vectors or --model")
        found, reason = [], ""
        for number, caption in enumerate(pair.captions):
            words, letters = num_words(caption), num_letters(caption)
            if words < rules.least_words or letters < rules.least_letters:
                reason = reason or "short"
            elif rules.most_words is not None and words > rules.most_words:
                reason = reason or "long"
            elif rules.least_similarity is not None and similarities[number] < rules.least_similarity:  # type: ignore[index]
                reason = "unlike"
            else:
                found.append(caption)
        return Verdict(tuple(found), "" if found else reason)

    def _once(self, digest: bytes, captions: Sequence[str]) -> Verdict:
        fresh = tuple(caption for caption in captions if (digest, folded(caption)) not in self._pairs)
        if not fresh:
            return Verdict((), "exact", self._pairs[digest, folded(captions[0])])
        return Verdict(fresh)

    def _keep(self, digest: bytes, verdict: Verdict, source: str) -> Verdict:
        if not verdict.reason:
            self._pictures.setdefault(digest, source)
            for caption in verdict.captions:
                self._pairs.setdefault((digest, folded(caption)), source)
        return verdict


def folded(caption: str) -> str:
    """What duplicates of a caption share: letter case and spaces do not tell them apart."""
    return " ".join(caption.lower().split())
