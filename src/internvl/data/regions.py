"""Boxes and points <-> text on the 0..1000 grid (spec 5.2). Answers are searched with patterns, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from internvl.tokens import BOX_END, BOX_START, QUAD_END, QUAD_START, REF_END, REF_START

GRID = 1000
"""Coordinates of the text: 0 is the left or upper edge, 1000 the right or lower one."""

Numbers = tuple[int, int, int, int]
"""x1, y1, x2, y2."""


class Box(NamedTuple):
    """A named box; the name is empty where the text gives none."""

    name: str
    box_1000: Numbers


class Points(NamedTuple):
    """Named points, such as the corners of a quadrilateral."""

    name: str
    points_1000: tuple[tuple[int, int], ...]


_REF = rf"(?:{REF_START}(?P<name>[^<]*){REF_END}\s*)?"
_BOXES = re.compile(rf"{_REF}{BOX_START}(?P<body>[^<]*){BOX_END}")
_QUADS = re.compile(rf"{_REF}{QUAD_START}(?P<body>[^<]*){QUAD_END}")
_GROUP = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"-?\d{1,7}(?:\.\d{0,9})?")


def to_grid(box_px: Sequence[float | int], width: int, height: int) -> Numbers:
    """A box in pixels of a picture of this size, on the grid (official: rounded)."""
    x1, y1, x2, y2 = (round(GRID * v / side) for v, side in zip(box_px, (width, height) * 2, strict=True))
    return x1, y1, x2, y2


def to_pixels(box_1000: Sequence[float | int], width: int, height: int) -> Numbers:
    """A box on the grid, in pixels of a picture of this size."""
    x1, y1, x2, y2 = (round(v * side / GRID) for v, side in zip(box_1000, (width, height) * 2, strict=True))
    return x1, y1, x2, y2


def format_boxes(name: str, boxes_1000: Iterable[Sequence[int]]) -> str:
    """`<ref>name</ref><box>[[x1, y1, x2, y2], ...]]</box>`; without a name, the box alone."""
    return f"{_format_name(name)}{BOX_START}{[list(box) for box in boxes_1000]}{BOX_END}"


def format_box(box: Box) -> str:
    """The official text of one box."""
    return format_boxes(box.name, [box.box_1000])


def format_points(points: Points) -> str:
    """`<ref>name</ref><quad>[[x, y], ...]]</quad>`."""
    return f"{_format_name(points.name)}{QUAD_START}{[list(point) for point in points.points_1000]}{QUAD_END}"


def parse_boxes(text: str) -> list[Box]:
    """Every box of a text, in order; groups of other than four numbers are not boxes. Corners are put in order."""
    found: list[Box] = []
    for match in _BOXES.finditer(text):
        for numbers in _groups(match["body"]):
            if len(numbers) == 4:
                x1, y1, x2, y2 = numbers
                found.append(Box((match["name"] or "").strip(), (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))))
    return found


def parse_points(text: str) -> list[Points]:
    """The points of every `<quad>`, written as pairs or as one run of numbers."""
    found = []
    for match in _QUADS.finditer(text):
        flat = [number for numbers in _groups(match["body"]) for number in numbers]
        if flat and len(flat) % 2 == 0:
            found.append(Points((match["name"] or "").strip(), tuple(zip(flat[::2], flat[1::2], strict=True))))
    return found


def _groups(body: str) -> list[list[int]]:
    """The numbers of each innermost bracket, held inside the grid."""
    return [
        [min(GRID, max(0, round(float(number)))) for number in _NUMBER.findall(group)] for group in _GROUP.findall(body)
    ]


def _format_name(name: str) -> str:
    if "<" in name:
        raise ValueError(f"a region named {name!r}; a name may not hold '<', it would end the mark")
    return f"{REF_START}{name}{REF_END}" if name else ""
