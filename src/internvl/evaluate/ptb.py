"""Captions into words as the COCO caption toolkit does: Penn Treebank rules, lower case, punctuation dropped.

The toolkit starts Stanford's Java tokenizer; these are its rules as far as captions meet them, checked against
recorded outputs of it. Scores are caption.py's.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

_SUFFIX = re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll))(?!\w)", re.IGNORECASE)
_NOT = re.compile(r"(?<=\w)(n't)(?!\w)", re.IGNORECASE)
_JOINED = re.compile(r"(?<!\w)(can)(not)(?!\w)|(?<!\w)(gon|wan)(na)(?!\w)|(?<!\w)(got)(ta)(?!\w)", re.IGNORECASE)
_TITLES = (
    "mr|mrs|ms|dr|prof|st|jr|sr|co|corp|inc|ltd|vs|etc|gen|col|capt|lt|sgt|gov|sen|rep|rev|ave|blvd|rd|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)


def _marks() -> str:
    """Signs that belong to the letter before them, as ranges of a pattern: vowels of Indic scripts and of Thai, points
    of Hebrew and Arabic, accents; and the two joiners inside words. Python's own word signs are without them."""
    found = [code for code in range(0x20000) if unicodedata.category(chr(code)).startswith("M")]
    runs = [list(run) for _, run in groupby(enumerate([*found, 0x200C, 0x200D]), key=lambda pair: pair[1] - pair[0])]
    return "".join(f"\\U{run[0][1]:08x}-\\U{run[-1][1]:08x}" for run in runs)


_MARKS = _marks()
_LETTERS = rf"[\w{_MARKS}]"
_TOKEN = re.compile(
    rf"""
    (?<!\w)(?:(?:[^\W\d_]\.){{2,}}|(?:{_TITLES})\.)      # u.s., mr.: the period belongs to the word
    | (?<!\w)no\.(?=\s*\d) | '\d\ds?(?!\w)             # no. 5, '90s
    | (?<!\w)(?-i:[A-Z]+(?:&[A-Z]+)+)(?!\w)             # AT&T
    | n't(?!\w) | 'n'(?!\w) | '(?:s|m|d|re|ve|ll)(?!\w)  # parts of contractions, cut off before
    | (?<!\w)[dol]'\w{{2,}}                              # o'clock
    | {_LETTERS}+(?:(?:[-/]|(?<=\d)[.,:](?=\d)){_LETTERS}+)*  # double-decker, a/b, 1,000, 5.00
    | [^\w\s][{_MARKS}]*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_DROPPED = frozenset("'`\".?!,:;-–—…“”„«»")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""Stanford's names for brackets. The toolkit means to drop them but compares in upper case, so they stay and count."""


def tokenise(caption: str) -> list[str]:
    """Words of a caption in any script; empty for a caption without words.

    Scripts that put no spaces between words give one word a run of letters, as the toolkit does: scores of Chinese or
    Japanese captions need words cut before.
    """
    text = caption.replace("’", "'").replace("‘", "'").replace("&amp;", "&")
    text = _JOINED.sub(lambda found: " ".join(part for part in found.groups() if part), text)
    text = _SUFFIX.sub(r" \1", _NOT.sub(r" \1", text))
    return [_BRACKETS.get(token, token.lower()) for token in _TOKEN.findall(text) if token not in _DROPPED]
