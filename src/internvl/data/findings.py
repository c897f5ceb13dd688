"""What check.py found: counts and sizes by set, findings one by one. Printing is report.py's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

NOTES = frozenset(["same_question", "declared_tokens", "cut"])
"""What is told but not wrong: the same question about the same picture, another tokenizer's length, a cut end."""
SUSPECT = frozenset(["same_line", "repeats", "declared_length", "declared_size", "header"])
"""What training would accept, but is wrong: found again, repeating itself, two numbers that disagree."""
MOST_FINDINGS = 100_000
"""Findings that are kept one by one; beyond, they are only counted."""


class Finding(NamedTuple):
    """One thing about one record, or about a set where `line` is 0."""

    name: str
    """Of the set."""
    file: str
    line: int | str
    """Of JSONL, the row of parquet, the member of a tar; 0 where the whole set is meant."""
    reason: str
    message: str


@dataclass
class SetReport:
    """One set."""

    name: str
    annotation: str
    max_length: int | None
    given: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    sizes: Int[np.ndarray, "measured 3"] = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    meta_ignored: tuple[str, ...] = ()
    """Fields of its entry in the meta JSON that nothing reads."""

    @property
    def accepted(self) -> int:
        return self.kinds.total()

    @property
    def rejected(self) -> int:
        return self.given - self.accepted

    @property
    def over(self) -> int:
        """Records of more tokens than a sample may have."""
        return 0 if self.max_length is None else int((self.sizes[:, 0] > self.max_length).sum())

    def to_json(self) -> dict[str, Any]:
        tokens, tiles, learned = self.sizes.T
        return {
            "annotation": self.annotation,
            "given": self.given,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "reasons": dict(sorted(self.reasons.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "tokens": spread(tokens),
            "tiles": spread(tiles),
            "learned": spread(learned),
            "max_length": self.max_length,
            "over_max_length": self.over,
            "ignored_fields": dict(sorted(self.ignored.items())),
            "ignored_meta_fields": list(self.meta_ignored),
        }


@dataclass
class Report:
    """All sets, and the findings in the order of sets and lines."""

    sets: list[SetReport]
    findings: list[Finding] = field(default_factory=list)
    left_off: int = 0
    """Findings that are counted but not listed."""

    def wrong(self, allowed: Sequence[str] = ()) -> int:
        """Findings that are neither notes nor allowed."""
        reasons = sum((some.reasons for some in self.sets), Counter[str]())
        return sum(count for reason, count in reasons.items() if reason not in NOTES and reason not in allowed)

    def to_json(self) -> dict[str, Any]:
        return {
            "given": sum(some.given for some in self.sets),
            "accepted": sum(some.accepted for some in self.sets),
            "rejected": sum(some.rejected for some in self.sets),
            "wrong": self.wrong(),
            "sets": {some.name: some.to_json() for some in self.sets},
            "findings": [some._asdict() for some in self.findings],
            "findings_left_off": self.left_off,
        }


def spread(values: Int[np.ndarray, " values"]) -> dict[str, int | float]:
    """How numbers are distributed; empty where there are none."""
    if not len(values):
        return {}
    at = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    found = np.percentile(values, list(at.values()), method="nearest").tolist()
    return {
        **dict(zip(at, map(int, found), strict=True)),
        "mean": round(float(values.mean()), 2),
        "sum": int(values.sum()),
    }
