"""Measures on hand-worked numbers, the reference grounding values, and laws of intervals."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.evaluate.catalog import CATALOG, find_task, measure_box, measure_name, measure_verbatim
from internvl.evaluate.ground import answer_box, answer_iou, iou
from internvl.evaluate.heldout import Row
from internvl.evaluate.intervals import estimate, estimate_ratio, wilson
from internvl.evaluate.vqa import contains, exact_match, normalise, verbatim_match
from reference import golden


def row(**fields: object) -> Row:
    known = {"id": "a", "image": "a.png", "question": "?", "answer": "x", "accept": ("x",), "task": "t"}
    return Row(**{**known, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("Yes.", ["yes"], True),
        ("  the RED\n car ", ["red car"], True),
        ("a", ["A"], True),
        ("A.", ["a"], True),
        ("yes, it is", ["yes"], False),
        ("two", ["2"], False),
        ("", ["yes"], False),
        ("triangle", ["tri angle"], False),
        ("ＲＥＤ", ["red"], True),
    ],
)
def test_exact_match(answer: str, accepted: list[str], right: bool) -> None:
    assert exact_match(answer, accepted) is right


@given(st.text())
def test_normalising_twice_changes_nothing_in_a_match(text: str) -> None:
    assert exact_match(text, [text])
    assert normalise(text) == normalise(f"  {text}\n")


def test_verbatim_keeps_case_and_punctuation() -> None:
    assert verbatim_match(" Hello,  World ", ["Hello, World"])
    assert not verbatim_match("hello, World", ["Hello, World"])
    assert verbatim_match("hello, World", ["Hello, World"], ignore_case=True)
    assert not verbatim_match("Hello World", ["Hello, World"], ignore_case=True)
    assert measure_verbatim("SALT", row(accept=("Salt",))) == {"exact as written": 0.0, "ignoring case": 1.0}


@pytest.mark.parametrize(
    ("answer", "names", "found"),
    [
        ("This is a Polar-Bear.", ["polar bear"], True),
        ("a category", ["cat"], False),
        ("a bobcat", ["cat"], False),
        ("a cat, asleep", ["dog", "cat"], True),
        ("cats", ["cat"], False),
        ("这是一只猫。", ["猫"], True),
        ("un éléphant", ["éléphant"], True),
        ("", ["cat"], False),
        ("anything", [""], False),
    ],
)
def test_containment_is_of_whole_words(answer: str, names: list[str], found: bool) -> None:
    assert contains(answer, names) is found


def test_names_are_split_by_what_training_showed() -> None:
    assert measure_name("a cat", row(accept=("cat",), name_seen=False)) == {
        "named": 1.0,
        "name not seen": 1.0,
    }
    assert measure_name("a dog", row(accept=("cat",))) == {"named": 0.0}


def test_iou_by_hand() -> None:
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert measure_box("<ref>a</ref><box>[[0, 0, 10, 10]]</box>", row(box=(0, 0, 10, 20))) == {
        "IoU >= 0.5": 1.0,
        "mean IoU": 0.5,
    }


@pytest.mark.parametrize(
    "answer", ["", "no box", "[[1,2,3]]", "[[a,b,c,d]]", "[[5,5,5,9]]", "[[9,1,2,4]]", "[[1,2,3,4"]
)
def test_malformed_boxes_miss(answer: str) -> None:
    assert answer_box(answer) is None
    assert answer_iou(answer, (0, 0, 1000, 1000)) == 0.0


def test_grounding_equals_the_reference() -> None:
    for case in json.loads(golden("metrics.json").read_text())["grounding"]:
        height, width = case["hw"]
        left, top, right, bottom = case["gt"]
        truth = (left / width * 1000, top / height * 1000, right / width * 1000, bottom / height * 1000)
        overlap = answer_iou(case["answer"], truth)
        assert overlap == pytest.approx(case["iou"], abs=1e-6)
        assert (overlap >= 0.5) is case["correct"]


side = st.integers(0, 1000)
boxes = st.tuples(side, side, side, side).map(
    lambda b: tuple(map(float, (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))))
)


@given(boxes, boxes)
def test_iou_is_symmetric_and_in_the_unit_interval(one: tuple, other: tuple) -> None:
    assert iou(one, other) == iou(other, one)
    assert 0.0 <= iou(one, other) <= 1.0


def test_wilson_by_hand() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="11 hits of 10"):
        wilson(11, 10)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1))
def test_shares_stay_in_their_interval(values: list[float]) -> None:
    found = estimate(values)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_bootstrap_is_repeatable_and_covers_the_mean() -> None:
    values = [math.sin(i) ** 2 for i in range(50)]
    assert estimate(values) == estimate(values)
    assert estimate(values).low < estimate(values).value < estimate(values).high


def test_loss_per_token_weighs_rows_by_length() -> None:
    assert estimate_ratio([6.0, 2.0], [2, 2]).value == 2.0
    assert estimate_ratio([9.0, 1.0], [3, 1]).value == 2.5
    with pytest.raises(ValueError, match="0 values"):
        estimate_ratio([], [])


@given(st.text(), st.booleans(), st.lists(st.text(min_size=1), min_size=1).map(tuple))
def test_every_measure_stays_in_the_unit_interval(answer: str, seen: bool, accept: tuple[str, ...]) -> None:
    example = row(box=(0.0, 0.0, 1.0, 1.0), name_seen=seen, accept=accept)
    for task in CATALOG.values():
        if task.measure != "loss":
            assert all(0.0 <= value <= 1.0 for value in task.measure(answer, example).values())


def test_catalog_names_its_metric() -> None:
    example = row(box=(0.0, 0.0, 1.0, 1.0))
    for task in CATALOG.values():
        if task.measure != "loss":
            assert next(iter(task.measure("x", example))) == task.metric
    with pytest.raises(ValueError, match="no task 'vqa'"):
        find_task("vqa")
