"""Boxes and points as text, and back: `<ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>` on the 0..1000 grid.

The grid is that of the whole picture, whatever its tiles (spec: data formats). What an answer means is
generate/answers.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from internvl.tokens import BOX_END, BOX_START, REF_END, REF_START

GRID = 1000

Numbers = tuple[float, float, float, float]

_NUMBER = r"-?\d+(?:\.\d+)?"
_BOX = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_POINT = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_MARKED = re.compile(
    rf"(?:{re.escape(REF_START)}(?P<name>(?:(?!{re.escape(REF_START)}).)*?){re.escape(REF_END)}\s*)?"
    rf"{re.escape(BOX_START)}(?P<body>.*?)(?:{re.escape(BOX_END)}|$)",
    re.DOTALL,
)


class NamedBox(NamedTuple):
    """One box: x1, y1, x2, y2 on the grid, as written."""

    name: str
    box_1000: Numbers


def parse_boxes(text: str) -> list[NamedBox]:
    """Boxes in the order of the text. Without `<box>` marks bare lists of four numbers count, named by nothing.

    Numbers are cut to the grid; a box without area, or with its corners swapped, is left out.
    """
    found = [(match["name"] or "", match["body"]) for match in _MARKED.finditer(text)] or [("", text)]
    boxes = [
        NamedBox(name.strip(), on_grid((float(a), float(b), float(c), float(d))))
        for name, body in found
        for a, b, c, d in _BOX.findall(body)
    ]
    return [box for box in boxes if box.box_1000[0] < box.box_1000[2] and box.box_1000[1] < box.box_1000[3]]


def parse_points(text: str) -> list[tuple[float, float]]:
    """Pairs of numbers in brackets, cut to the grid."""
    return [(_clip(float(x)), _clip(float(y))) for x, y in _POINT.findall(text)]


def format_boxes(name: str, boxes_1000: Sequence[Sequence[float]]) -> str:
    """One name and its boxes, as models learn to write them."""
    rows = ", ".join(f"[{', '.join(str(round(number)) for number in box)}]" for box in boxes_1000)
    return f"{REF_START}{name}{REF_END}{BOX_START}[{rows}]{BOX_END}"


def on_grid(box: Numbers) -> Numbers:
    """The part of the box that the grid holds."""
    left, top, right, bottom = (_clip(number) for number in box)
    return left, top, right, bottom


def to_pixels(box_1000: Numbers, width: int, height: int) -> Numbers:
    """Grid to pixels of a picture of this size, not rounded."""
    left, top, right, bottom = box_1000
    return left * width / GRID, top * height / GRID, right * width / GRID, bottom * height / GRID


def to_grid(box_px: Numbers, width: int, height: int) -> tuple[int, int, int, int]:
    """Pixels to whole numbers of the grid: round(1000 x / width) (official)."""
    left, top, right, bottom = box_px
    return (
        round(GRID * left / width),
        round(GRID * top / height),
        round(GRID * right / width),
        round(GRID * bottom / height),
    )


def _clip(number: float) -> float:
    return min(max(number, 0.0), float(GRID))
