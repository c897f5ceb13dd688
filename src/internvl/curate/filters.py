"""Is a record good enough to be learned from: the rules of paper 2.5, section 4.3, on one record at a time.

Scores are read or asked for elsewhere (judge.py); sets and files are filter_sets.py's. Pictures are not opened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from internvl.data.records import Record
from internvl.data.repetition import Bounds

Score = Literal["quality", "repetition"]
HIGHEST = 10.0
"""Of a score, from 0 (paper 2.5, section 4.3)."""


class Verdict(NamedTuple):
    """Why a record goes."""

    reason: str
    message: str


@dataclass(frozen=True)
class Rules:
    """From where on a record goes. Scores and the n-gram bound are the paper's and its code's, other numbers ours."""

    quality: float = 7.0
    """Least score of a text-only record (paper 2.5, section 4.3: below 7 goes)."""
    repetition: float = 3.0
    """Least score for not repeating itself, of every record (paper 2.5, section 4.3: below 3 goes)."""
    quality_field: str = ""
    """Field of a record that holds its quality score; empty: there is none."""
    repetition_field: str = ""
    """Field of a record that holds its repetition score; empty: there is none."""
    shortest: int = 1
    """Characters of an answer."""
    longest: int = 20_000
    """Characters of an answer: "abnormal length" in the paper, which gives no number."""
    zeros: int = 30
    """Longest run of the digit 0: "long runs of zeros" in the paper, which gives no number."""
    bounds: Bounds = field(default_factory=Bounds)
    """From where on a text repeats itself: n-grams, lines, stretches of one unit."""
    exempt: tuple[str, ...] = ()
    """Sets that are not searched for repetition (paper: well-known academic ones)."""
    duplicates: Literal["none", "line", "question"] = "line"
    """What goes when it comes again: an equal line, or the same question about the same media; the first stays."""

    def __post_init__(self) -> None:
        for name in ("quality", "repetition"):
            if not 0 <= getattr(self, name) <= HIGHEST:
                raise ValueError(f"{name} is {getattr(self, name)}; scores are 0 to {HIGHEST:g}")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"answers of {self.shortest} to {self.longest} characters; it must be 1 <= shortest <= longest"
            )

    def wants(self, record: Record, set_name: str) -> tuple[Score, ...]:
        """Scores that decide about a record: quality of text only; repetition outside exempt sets."""
        quality: tuple[Score, ...] = ("quality",) if record.kind == "text" else ()
        return quality if set_name in self.exempt else (*quality, "repetition")

    def least(self, score: Score) -> float:
        return self.quality if score == "quality" else self.repetition

    def judge(self, score: Score, value: float) -> Verdict | None:
        """What a score says."""
        least = self.least(score)
        return Verdict(f"{score}_score", f"{score} {value:g}; the least is {least:g}") if value < least else None

    def read(self, data: Mapping[str, Any], score: Score) -> float | None:
        """A score that stands in the record; None where it has none. ValueError where it is no score."""
        name = self.quality_field if score == "quality" else self.repetition_field
        value = data.get(name) if name else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= HIGHEST:
            raise ValueError(f"`{name}` is no score of 0 to {HIGHEST:g}")
        return float(value)

    def look(self, data: Mapping[str, Any], record: Record, set_name: str) -> tuple[Verdict | None, tuple[Score, ...]]:
        """The verdict of everything but a model; and the scores that nobody gave."""
        missing: list[Score] = []
        for score in self.wants(record, set_name):
            try:
                value = self.read(data, score)
            except ValueError as error:
                return Verdict("bad_score", str(error)), ()
            if value is None:
                missing.append(score)
            elif (verdict := self.judge(score, value)) is not None:
                return verdict, ()
        for turn in record.turns:
            if turn.role == "assistant" and (verdict := self._answer(turn.text, set_name)) is not None:
                return verdict, ()
        return None, tuple(missing)

    def _answer(self, text: str, set_name: str) -> Verdict | None:
        if not self.shortest <= len(text.strip()) <= self.longest:
            said = f"an answer of {len(text.strip())} characters; the limits are {self.shortest} and {self.longest}"
            return Verdict("length", said)
        zeros = max(map(len, re.findall("0+", text)), default=0)
        if zeros > self.zeros:
            return Verdict("zeros", f"{zeros} zeros in a row; the limit is {self.zeros}")
        complaint = "" if set_name in self.exempt else self.bounds.complaint(text)
        return Verdict("repeats", complaint) if complaint else None


def parse_score(answer: str) -> float | None:
    """The score in a model's answer: its first number, if that is 0 to 10; None where it says none."""
    found = re.search(r"(?<![\d.])\d{1,3}(?:\.\d+)?", answer)
    value = float(found.group()) if found else math.nan
    return value if 0 <= value <= HIGHEST else None
