"""Repetition against slow definitions, and against texts that do and do not repeat themselves."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.data.repetition import Bounds, longest_stretch, repeated_lines, repeated_ngrams

SOUND = (
    "The picture shows a narrow street in the evening. Two people carry a long ladder past a bakery whose window is "
    "still lit, and a dog follows them at some distance. Step 1: count the windows. Step 2: subtract the dark ones. "
    "The answer is therefore 17, which agrees with the sign above the door."
)


def slow_stretch(text: str) -> int:
    """Every start, every unit, letter by letter."""
    best = 0
    for period in range(1, min(64, len(text) // 2) + 1):
        for start in range(len(text) - 2 * period + 1):
            end = start + period
            while end < len(text) and text[end] == text[end - period]:
                end += 1
            if end - start >= 2 * period:
                best = max(best, end - start)
    return best


@given(st.text("ab0 猫", max_size=40), st.text("ab", min_size=1, max_size=4), st.integers(0, 6))
def test_the_longest_stretch_is_that_of_the_definition(text: str, unit: str, times: int) -> None:
    whole = text + unit * times + text[::-1]
    length, found = longest_stretch(whole)
    assert length == slow_stretch(whole)
    if length:
        assert length >= 2 * len(found)
        assert (found * length)[:length] in whole


@given(st.lists(st.sampled_from(["a", "b", "cc"]), max_size=30), st.integers(1, 4))
def test_ngrams_are_counted_as_defined(words: list[str], n: int) -> None:
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    expected = sum(grams.count(gram) > 1 for gram in set(grams)) / len(set(grams)) if grams else 0.0
    assert repeated_ngrams(" ".join(words), n) == expected


@given(st.lists(st.sampled_from(["a", "b", "cc"]), max_size=30), st.integers(1, 5), st.integers(1, 4))
def test_what_the_official_share_refuses_is_refused(words: list[str], times: int, n: int) -> None:
    """It divides by all n-grams, not by the distinct ones, so the more often a text repeats, the smaller it gets."""
    words = words * times
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    official = sum(grams.count(gram) > 1 for gram in set(grams)) / len(grams) if grams else 0.0
    assert repeated_ngrams(" ".join(words), n) >= official


def test_lines() -> None:
    assert repeated_lines("a\n\nb\n a \na") == 0.5
    assert repeated_lines("a\na", min_lines=3) == repeated_lines("") == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0" * 200, "'0' again and again over 200 characters; the limit is 100"),
        ("Let me see. " + "wait, " * 30, "again and again"),
        ("".join(f"{n}\n{'The same line of words.'}\n" for n in range(9)), ""),
        (
            "\n".join(
                f"Check {word}."
                for word in ["one", "two", "ten", "six", "ten", "one", "six", "two", "six", "ten", "two", "one"]
            ),
            "67% of its",
        ),
        (f"{SOUND} {SOUND}", "of its 10-grams occur more than once; the limit is 40%"),
        ("的图片里有一只猫和一条狗在街上走" * 9, "again and again"),
    ],
)
def test_texts_that_repeat_themselves(text: str, said: str) -> None:
    complaint = Bounds().complaint(text)
    assert said in complaint
    assert bool(said) == bool(complaint)


def test_sound_texts_pass() -> None:
    table = "| name | price | size |\n| --- | --- | --- |\n| tea | 2.50 | small |\n| coffee | 3.00 | large |\n"
    code = "".join(f"        value_{n} = compute(value_{n - 1}, {n})\n" for n in range(12))
    for text in ("", "A cat.", "yes", SOUND, table, code, "<ref>cat</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>"):
        assert Bounds().complaint(text) == ""


def test_hostile_texts_take_no_longer_than_others() -> None:
    start = time.process_time()
    for text in ("ab" * 500_000, "a" * 1_000_000, "\n" * 1_000_000, "a " * 500_000, "\ud800" * 1000):
        Bounds().complaint(text)
    assert time.process_time() - start < 10
