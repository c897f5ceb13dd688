"""Boxes: the one in an answer, overlap with the true one. Boxes are x1, y1, x2, y2 on the 0..1000 grid of the picture.

Overlap is a ratio of areas, so the grid gives the same number as pixels do.
"""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]

IOU_HIT = 0.5  # RefCOCO protocol; official internvl_chat/eval/refcoco
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def answer_box(answer: str) -> Box | None:
    """The first four numbers in square brackets, tags or none; None where there are none or the box has no area."""
    found = _BOX.search(answer)
    if found is None:
        return None
    left, top, right, bottom = (float(number) for number in found.groups())
    return (left, top, right, bottom) if left < right and top < bottom else None


def iou(box: Box, other: Box) -> float:
    """Intersection over union; 0 where either has no area."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (area(box) + area(other) - shared)


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def answer_iou(answer: str, truth: Box) -> float:
    """Overlap of the answer's box with the true one; a malformed answer overlaps nothing."""
    box = answer_box(answer)
    return 0.0 if box is None else iou(box, truth)
