"""What an answer says: boxes in pixels, yes or no, the option chosen, the final answer. Parsing regions is data's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from internvl.data.images import Source, header_size, open_image
from internvl.data.regions import Numbers, parse_boxes, to_pixels

_YES = re.compile(r"\W*(?:(?:yes|yeah|yep|true|oui)\b|是|对|有)", re.IGNORECASE)
_NO = re.compile(r"\W*(?:(?:no|nope|not|false|non)\b|不|否|没)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_FINAL = re.compile(r"(?:final answer|answer|答案)\s*(?:is|:|：|是)+\s*(.+)", re.IGNORECASE)


class Region(NamedTuple):
    """A box of an answer."""

    name: str
    box_px: Numbers
    """x1, y1, x2, y2 in pixels of the picture as it is shown upright."""
    box_1000: Numbers


def regions(text: str, size: tuple[int, int]) -> tuple[Region, ...]:
    """Boxes of an answer about a picture of this width and height in pixels."""
    return tuple(Region(box.name, to_pixels(box.box_1000, *size), box.box_1000) for box in parse_boxes(text))


def picture_size(source: Source) -> tuple[int, int]:
    """Width and height in pixels, upright; from the header where there is one."""
    return header_size(source) if isinstance(source, (str, Path, bytes)) else open_image(source).size


def yes_or_no(text: str) -> bool | None:
    """What the answer begins with; None where it is neither."""
    if _YES.match(text):
        return True
    return False if _NO.match(text) else None


def option(text: str, letters: Sequence[str] = ("A", "B", "C", "D")) -> str | None:
    """The letter that the answer gives: alone, in brackets, followed by a stop, or after "answer is"."""
    one = "|".join(re.escape(letter) for letter in letters)
    for pattern in (
        rf"\W*({one})(?:\W|$)(?!\s*[a-z])",
        rf"\W*({one})[\.\):：,]",
        rf"(?:answer|option|choice)\s*(?:is|:|：)?\s*\(?({one})\b",
        rf"\(({one})\)",
    ):
        found = re.match(pattern, text) if pattern.startswith(r"\W*") else re.search(pattern, text, re.IGNORECASE)
        if found:
            return found.group(1).upper() if found.group(1) not in letters else found.group(1)
    return None


def final_answer(text: str) -> str:
    """What stands in \\boxed{}, else after the last "answer is" or "answer:", else the whole text."""
    boxed = _BOXED.findall(text)
    if boxed:
        return str(boxed[-1]).strip()
    said = _FINAL.findall(text)
    return (str(said[-1]) if said else text).strip().rstrip(".。").strip("*` ")
