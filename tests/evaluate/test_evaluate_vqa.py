"""Short answers by the protocols of the public benchmarks: recorded scores, numbers by hand, laws."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.evaluate.vqa import anls, edit_distance, fold_vqa, plain_match, relaxed_match, vqa_accuracy
from reference import golden


def recorded() -> dict:
    return json.loads(golden("metrics.json").read_text())["vqa"]


def test_vqa_accuracy_equals_the_official() -> None:
    kept = recorded()["vqa_accuracy"]
    for case in kept["cases"]:
        assert fold_vqa(case["pred"]) == case["processed"]
        assert vqa_accuracy(case["pred"], case["answers"]) == pytest.approx(case["score"])


def test_anls_equals_the_official() -> None:
    kept = recorded()["docvqa_anls"]
    for case in kept["cases"]:
        assert anls(case["pred"], case["answers"]) == pytest.approx(case["score"])


def test_st_vqa_equals_the_official() -> None:
    kept = recorded()
    cases = kept["vqa_accuracy"]["cases"]
    found = [anls(case["pred"], case["answers"], join_spaces=False) for case in cases]
    assert sum(found) / len(found) == pytest.approx(kept["stvqa_anls"])


def test_relaxed_and_plain_match_equal_the_official() -> None:
    kept = recorded()
    for case in kept["relaxed"]:
        # the official list calls relaxed_correctness(target, pred) with the answer in `pred`
        assert relaxed_match(case["pred"], case["target"]) is case["correct"], case
    share = sum(plain_match(case["pred"], [case["target"]]) for case in kept["relaxed"]) / len(kept["relaxed"])
    assert share == pytest.approx(kept["exact_mean"])


@pytest.mark.parametrize(
    ("answer", "folded"),
    [
        ("The Dog's", "dog 's"),
        ("two, or three?", "2 or 3"),
        ("couldnt've", "couldn't've"),
        ("black/white", "black white"),
        ("3.5 m.", "3.5 m"),
        ("猫", "猫"),
    ],
)
def test_folding_by_hand(answer: str, folded: str) -> None:
    assert fold_vqa(answer) == folded


def test_votes_by_hand() -> None:
    people = ["red"] * 2 + ["blue"] * 8
    # leaving a red one out leaves 1 vote (1/3), leaving a blue one out leaves 2 (2/3)
    assert vqa_accuracy("Red", people) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    with pytest.raises(ValueError, match="1 answers of people"):
        vqa_accuracy("a", ["a"])


def test_anls_by_hand() -> None:
    assert anls("abcd", ["abce"]) == 0.75
    assert anls("ab", ["cd"]) == 0.0
    assert anls("", [""]) == 1.0
    with pytest.raises(ValueError, match="no accepted answer"):
        anls("a", [])


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edit_distance_is_a_distance(one: str, other: str, third: str) -> None:
    assert (edit_distance(one, other) == 0) == (one == other)
    assert edit_distance(one, other) == edit_distance(other, one)
    assert edit_distance(one, third) <= edit_distance(one, other) + edit_distance(other, third)


@given(st.text(max_size=20))
def test_an_answer_matches_itself(text: str) -> None:
    assert vqa_accuracy(text, [text] * 10) == 1.0
    assert anls(text, [text]) == 1.0
    assert plain_match(text, [text])
