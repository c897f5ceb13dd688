"""What every reader of a packaged set yields: one picture's bytes with the words its package gives for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["photo", "drawing", "symbol", "background"]


def set_of(words: str) -> frozenset[str]:
    """The words of a text: a table of words that stays readable."""
    return frozenset(words.split())


@dataclass(frozen=True)
class Found:
    data: bytes
    """The file as the package has it."""
    path: str
    """Inside the package."""
    source: str
    kind: Kind
    title: str
    """English, as written; empty where the package names nothing."""
    captions: tuple[str, ...] = ()
    """English sentences."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Other languages: fr, zh."""
    keywords: tuple[str, ...] = ()
    category: str = ""
    series: str = ""
    """Pictures of one series are variants of each other and stay on one side of the split."""
