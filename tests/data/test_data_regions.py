"""Boxes and points survive text; answers written loosely are still read; hostile ones harm nothing."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.data.regions import (
    Box,
    Numbers,
    Points,
    format_box,
    format_boxes,
    format_points,
    parse_boxes,
    parse_points,
    to_grid,
    to_pixels,
)

coordinate = st.integers(0, 1000)
name = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12).map(str.strip)


@st.composite
def box(draw: st.DrawFn) -> Numbers:
    x1, x2 = sorted((draw(coordinate), draw(coordinate)))
    y1, y2 = sorted((draw(coordinate), draw(coordinate)))
    return x1, y1, x2, y2


@given(st.builds(Box, name, box()))
def test_box_survives_text(found: Box) -> None:
    assert parse_boxes(f"It is {format_box(found)}, there.") == [found]


@given(st.lists(st.tuples(name, st.lists(box(), min_size=1, max_size=4)), max_size=4))
def test_many_boxes_survive_text(named: list[tuple[str, list[Numbers]]]) -> None:
    text = " and ".join(format_boxes(label, boxes) for label, boxes in named)
    assert parse_boxes(text) == [Box(label, one) for label, boxes in named for one in boxes]


@given(st.builds(Points, name, st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=6).map(tuple)))
def test_points_survive_text(points: Points) -> None:
    assert parse_points(format_points(points)) == [points]


@given(box(), st.integers(1000, 5000), st.integers(1000, 5000))
def test_grid_survives_pixels_of_a_large_picture(found: Numbers, width: int, height: int) -> None:
    assert to_grid(to_pixels(found, width, height), width, height) == found


def test_official_form() -> None:
    text = "<ref>the cat</ref><box>[[10, 20, 300, 400], [0, 0, 1000, 1000]]</box>"
    assert format_boxes("the cat", [(10, 20, 300, 400), (0, 0, 1000, 1000)]) == text
    assert to_grid((13, 5, 130, 100), 260, 200) == (50, 25, 500, 500)


@pytest.mark.parametrize(
    "text",
    [
        "<ref> dog </ref> <box> [[ 10,20 ,300,  400 ]] </box>",
        "<ref>dog</ref><box>[10, 20, 300, 400]</box>",
        "<ref>dog</ref>\n<box>[[10.2, 19.9, 300.0, 400.]]</box>",
        "<ref>dog</ref><box>[[300, 400, 10, 20]]</box>",
        "<ref>dog</ref><box>[[10, 20, 300, 400], [1, 2, 3]]</box>",
    ],
)
def test_loose_answers_are_read(text: str) -> None:
    assert parse_boxes(text) == [Box("dog", (10, 20, 300, 400))]


def test_numbers_outside_stay_on_the_grid() -> None:
    assert parse_boxes("<box>[[-5, 20, 3000, 400]]</box>") == [Box("", (0, 20, 1000, 400))]


@pytest.mark.parametrize(
    "text",
    ["", "no box", "<box>[[1, 2, 3, 4]]", "<box></box>", "<box>__import__('os')</box>", "<quad>[[1, 2, 3]]</quad>"],
)
def test_what_is_no_region_gives_none(text: str) -> None:
    assert parse_boxes(text) == []
    assert parse_points(text) == []


def test_a_hostile_answer_takes_no_time() -> None:
    start = time.perf_counter()
    parse_boxes("<ref>" * 50_000 + "<box>" * 50_000 + "[" * 50_000 + "9" * 50_000)
    parse_boxes("<box>" + "[1, 2" * 50_000 + "</box>")
    assert time.perf_counter() - start < 5


def test_a_name_that_would_end_the_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="may not hold"):
        format_box(Box("a</ref>", (0, 0, 1, 1)))
