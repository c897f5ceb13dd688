"""Captions into words as the COCO caption toolkit does: Penn Treebank rules, lower case, punctuation dropped.

The toolkit starts Stanford's Java tokenizer; these are its rules as far as captions meet them, checked against
recorded outputs of it. Scores are caption.py's.
"""

from __future__ import annotations

import re

_SUFFIX = re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll))(?!\w)", re.IGNORECASE)
_NOT = re.compile(r"(?<=\w)(n't)(?!\w)", re.IGNORECASE)
_JOINED = re.compile(r"(?<!\w)(can)(not)(?!\w)|(?<!\w)(gon|wan)(na)(?!\w)|(?<!\w)(got)(ta)(?!\w)", re.IGNORECASE)
_TITLES = (
    "mr|mrs|ms|dr|prof|st|jr|sr|co|corp|inc|ltd|vs|etc|gen|col|capt|lt|sgt|gov|sen|rep|rev|ave|blvd|rd|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
_TOKEN = re.compile(
    rf"""
    (?<!\w)(?:(?:[^\W\d_]\.){{2,}}|(?:{_TITLES})\.)      # u.s., mr.: the period belongs to the word
    | (?<!\w)no\.(?=\s*\d) | '\d\ds?(?!\w)             # no. 5, '90s
    | (?<!\w)(?-i:[A-Z]+(?:&[A-Z]+)+)(?!\w)             # AT&T
    | n't(?!\w) | 'n'(?!\w) | '(?:s|m|d|re|ve|ll)(?!\w)  # parts of contractions, cut off before
    | (?<!\w)[dol]'\w{{2,}}                              # o'clock
    | \w+(?:(?:[-/]|(?<=\d)[.,:](?=\d))\w+)*             # double-decker, a/b, 1,000, 5.00
    | [^\w\s]
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
