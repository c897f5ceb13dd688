"""Records of every kind, and every way in which a line can be wrong: the error says file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.data.records import Problem, Record, parse_line, parse_record, read_records
from internvl.data.templates import Turn


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if at % 2 else "human", "value": text} for at, text in enumerate(texts)]


def test_kinds() -> None:
    text = parse_record({"conversations": talk("Q", "A")})
    image = parse_record({"conversations": talk("<image>\nQ", "A"), "image": "a.jpg", "width": 3, "id": 7}, "root")
    several = parse_record(
        {"conversations": talk("<image> <image>", "A", "and <image>?", "B"), "image": ["a", "b", "c"]}
    )
    video = parse_record({"conversations": talk("<video>\nQ", "A"), "video": "v.mp4", "clip": [1, 2.5]}, "/r")
    assert [record.kind for record in (text, image, several, video)] == ["text", "image", "images", "video"]
    assert image == Record((Turn("user", "<image>\nQ"), Turn("assistant", "A")), ("root/a.jpg",), id="7")
    assert several.images == ("a", "b", "c")
    assert (video.video, video.clip) == ("/r/v.mp4", (1.0, 2.5))


@pytest.mark.parametrize("empty", [{}, {"image": ""}, {"image": None}, {"image": []}, {"video": ""}])
def test_an_empty_medium_is_none(empty: dict[str, Any]) -> None:
    assert parse_record({"conversations": talk("Q", "A"), **empty}).kind == "text"


def test_a_single_medium_without_mark_comes_first() -> None:
    turns = [{"from": "system", "value": "S"}, *talk("Q", "A", "R", "B")]
    assert parse_record({"conversations": turns, "image": "a"}).turns[1].text == "<image>\nQ"
    assert parse_record({"conversations": turns, "video": "v"}).turns[1].text == "<video>\nQ"


def test_unknown_fields_are_listed() -> None:
    assert parse_record({"conversations": talk("Q", "A"), "task": "x", "area": 1}).ignored == ("area", "task")


def test_a_mark_in_an_answer_is_text() -> None:
    assert parse_record({"conversations": talk("Q", "write <image>")}).kind == "text"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "no `conversations`"),
        ({"conversations": []}, "no `conversations`"),
        ({"conversations": ["Q"]}, "something else than objects"),
        ({"conversations": [{"from": "me", "value": "Q"}]}, "role 'me'"),
        ({"conversations": talk("Q")}, "ends with an answer"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "ends with an answer"),
        ({"conversations": [{"from": "system", "value": "S"}]}, "ends with an answer"),
        ({"conversations": talk("Q", "A")[:1] * 2}, "must alternate"),
        ({"conversations": [*talk("Q", "A"), {"from": "system", "value": "S"}, *talk("Q", "A")]}, "must alternate"),
        ({"conversations": talk("Q", " \n")}, r"turn 1 \(assistant\) is empty"),
        ({"conversations": talk("", "A")}, r"turn 0 \(user\) is empty"),
        (
            {"conversations": talk("<image> <image>", "A"), "image": "a"},
            "2 <image> marks .* but 1 images",
        ),
        ({"conversations": talk("<image>", "A")}, "1 <image> marks in the questions but 0 images; make them equal"),
        ({"conversations": talk("Q", "A"), "image": ["a", "b"]}, "0 <image> marks in the questions but 2 images"),
        ({"conversations": talk("<image>", "A <image>"), "image": ["a", "b"]}, "1 <image> marks .* but 2 images"),
        ({"conversations": talk("<video><video>", "A"), "video": "v"}, "2 <video> marks in the questions but 1 videos"),
        ({"conversations": talk("Q", "A"), "video": "v", "image": "a"}, "1 videos and 1 images"),
        ({"conversations": talk("Q", "A"), "video": ["v", "w"]}, "2 videos and 0 images"),
        ({"conversations": talk("Q", "A"), "image": 5}, "`image` is 5"),
        ({"conversations": talk("Q", "A"), "image": [["a"]]}, "`image` is"),
        ({"conversations": talk("Q", "A"), "video": "v", "clip": [3, 1]}, r"`clip` is \[3, 1\]"),
        ({"conversations": talk("Q", "A"), "video": "v", "clip": [0, float("inf")]}, r"`clip` is \[0, inf\]"),
    ],
)
def test_bad_records_say_where_and_what(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"set\.jsonl:3: .*{said}"):
        parse_record(data, source="set.jsonl:3")


@pytest.mark.parametrize("line", [b"{", b"", b"[1]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_broken_lines_say_where(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"set\.jsonl:9: (not a JSON line|a JSON \w+; a record is an object)"):
        parse_line(line, source="set.jsonl:9")


def write(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    good = json.dumps({"conversations": talk("Q", "A")})
    path.write_text(f"{good}\n\n{{broken\n{good}\n{{}}\n{good}")
    return path


def test_the_first_broken_line_is_raised(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match=r"set\.jsonl:3: not a JSON line"):
        list(read_records(path))


def test_broken_lines_can_be_listed(tmp_path: Path) -> None:
    path = write(tmp_path)
    problems: list[Problem] = []
    records = list(read_records(path, problems=problems))
    assert [record.source for record in records] == [f"{path}:1", f"{path}:4", f"{path}:6"]
    assert [problem.source for problem in problems] == [f"{path}:3", f"{path}:5"]
    assert "no `conversations`" in problems[1].message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("conversations", "image", "video", "clip"), json_values)))
def test_any_object_gives_a_record_or_a_typed_error(data: dict[str, Any]) -> None:
    try:
        parse_record(data, source="s:1")
    except ValueError as error:
        assert str(error).startswith("s:1: ")  # noqa: PT017 - both outcomes are right
