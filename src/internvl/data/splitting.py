"""Where a sample that does not fit into its row is cut: never inside a picture. Two rules, ours and the official one.

Knows places of pictures and of learned tokens only; which row a part goes to is packing.py's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

MIN_LEARNED_SHARE = 1 / 256
"""A part of a row that learns no larger share of its tokens is left out (official `check_valid`)."""


class Segment(NamedTuple):
    """A sample, or a part of one, in a packed row."""

    place: int
    """Of the sample, in the epoch's order."""
    tokens: int
    tiles: int
    start: int = 0
    """The part's first token in the sample."""
    first_tile: int = 0


class Span(NamedTuple):
    """The tokens of a picture, from `<img>` to behind `</img>`."""

    start: int
    end: int
    tiles: int


class Layout(NamedTuple):
    """Where the pictures and the learned tokens of a sample are."""

    pictures: tuple[Span, ...]
    learned: Bool[np.ndarray, " length"]

    def part(self, place: int, start: int, end: int) -> Segment:
        """Tokens [start, end) of the sample; pictures are inside or outside as a whole."""
        before = sum(span.tiles for span in self.pictures if span.start < start)
        inside = sum(span.tiles for span in self.pictures if start <= span.start < end)
        return Segment(place, end - start, inside, start, before)


def own_cut(segment: Segment, limit: int, layout: Layout) -> list[Segment]:
    """Parts of at most `limit` tokens in which every learned token of the sample is learned once.

    A cut moves to the start of the picture it would be in; a cut before a learned token repeats the token before it, so
    that something predicts it. Parts that learn nothing are left out.
    """
    parts, start, length = [], 0, len(layout.learned)
    if length <= limit:
        return [layout.part(segment.place, 0, length)]
    while start < length:
        end = min(length, start + limit)
        if end < length:
            end = next((span.start for span in layout.pictures if span.start < end < span.end), end)
        if end <= start + 1:
            raise ValueError(
                f"a picture or a rest of {length - start} tokens; a row has {limit}; "
                "raise batch_tokens or lower max_tiles"
            )
        if layout.learned[start + 1 : end].any():
            parts.append(layout.part(segment.place, start, end))
        start = end - 1 if end < length and layout.learned[end] else end
    return parts


def official_cut(segments: Sequence[Segment], limit: int, layout: Callable[[int], Layout]) -> list[list[Segment]]:
    """Rows of at most `limit` tokens out of one that is longer, with what the official rule loses.

    The row goes on at the cut where that is at a picture, else at the next picture: the words between are lost, as are
    rows without pictures and those that learn next to nothing (official `split_buffer`).
    """
    rows: list[list[Segment]] = []
    rest = list(segments)
    while sum(segment.tokens for segment in rest) > limit:
        pictures = _pictures(rest, layout)
        at = bisect_right([span.start for span in pictures], limit)
        if at and limit < pictures[at - 1].end:
            end = begin = pictures[at - 1].start
        else:
            end, begin = limit, pictures[at].start if at < len(pictures) else -1
        left = _between(rest, 0, end, layout)
        if _has_pictures(left) and _learns(left, layout):
            rows.append(left)
        if begin < 0:
            return rows
        rest = _between(rest, begin, sum(segment.tokens for segment in rest), layout)
    if _learns(rest, layout):
        rows.append(rest)
    return rows


def _pictures(segments: Sequence[Segment], layout: Callable[[int], Layout]) -> list[Span]:
    """The pictures of a row, by their tokens in it."""
    found, offset = [], 0
    for segment in segments:
        spans = layout(segment.place).pictures
        shift = offset - segment.start
        end = segment.start + segment.tokens
        found += [Span(s.start + shift, s.end + shift, s.tiles) for s in spans if segment.start <= s.start < end]
        offset += segment.tokens
    return found


def _between(segments: Sequence[Segment], begin: int, end: int, layout: Callable[[int], Layout]) -> list[Segment]:
    """What stands at tokens [begin, end) of a row."""
    found, offset = [], 0
    for segment in segments:
        low, high = max(begin, offset), min(end, offset + segment.tokens)
        if low < high or (not segment.tokens and begin <= offset < end):  # one that cannot be used: making it says why
            shift = segment.start - offset
            found.append(layout(segment.place).part(segment.place, low + shift, high + shift))
        offset += segment.tokens
    return found


def _has_pictures(segments: Sequence[Segment]) -> bool:
    return any(segment.tiles for segment in segments)


def _learns(segments: Sequence[Segment], layout: Callable[[int], Layout]) -> bool:
    learned = sum(int(layout(p.place).learned[p.start : p.start + p.tokens].sum()) for p in segments)
    return learned > MIN_LEARNED_SHARE * sum(segment.tokens for segment in segments)
