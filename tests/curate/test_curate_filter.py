"""Filtering: kept + rejected = given line for line, what is sound stays, each rule takes what it names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.commands.curate import main
from internvl.curate.filter_sets import filter_sets
from internvl.curate.filters import Rules, parse_score
from internvl.curate.judge import PROMPTS, Judge
from internvl.data.mixture import DataSet, read_sets

PROSE = "Two people carry a long ladder past a bakery whose window is still lit, and a dog follows at some distance."


def line(number: int, answer: str = "A cat.", question: str = "", **more: Any) -> str:
    turns = [{"from": "human", "value": question or f"What is {number}?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": number, "conversations": turns, **more}, ensure_ascii=False)


def write(folder: Path, lines: Sequence[str], name: str = "set", **more: Any) -> DataSet:
    path = folder / f"{name.replace('/', '_')}.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    return DataSet(str(path), str(folder), name, **more)


def run(
    folder: Path, lines: Sequence[str], rules: Rules | None = None, **rest: Any
) -> tuple[list[str], list[dict[str, Any]]]:
    """Kept lines and rejected entries."""
    out = folder / f"out{len(list(folder.iterdir()))}"
    filter_sets([write(folder, lines)], out, rules or Rules(), **rest)
    kept = (out / "set.kept.jsonl").read_text().splitlines()
    return kept, [json.loads(row) for row in (out / "set.rejected.jsonl").read_text().splitlines()]


GONE = {
    "json": ("json", "{broken"),
    "roles": ("roles", line(50).replace("human", "gpt")),
    "stretch": ("repeats", line(50, "Let me see. " + "wait, " * 40)),
    "ngrams": ("repeats", line(50, f"{PROSE} {PROSE} {PROSE}")),
    "lines": (
        "repeats",
        line(
            50,
            "\n".join(
                f"Check {n}." for n in ["one", "two", "ten", "six", "ten", "one", "six", "two", "six", "ten"] * 2
            ),
        ),
    ),
    "zeros": ("zeros", line(50, "The result is 1" + "0" * 40)),
    "length": ("length", line(50, " ".join(map(str, range(6000))))),
    "again": ("same_line", line(3)),
}


@pytest.mark.parametrize("kind", GONE)
def test_each_rule_takes_what_it_names(tmp_path: Path, kind: str) -> None:
    reason, bad = GONE[kind]
    lines = [line(n) for n in range(6)]
    kept, gone = run(tmp_path, [*lines, bad, line(7)])
    assert kept == [*lines, line(7)]
    assert [(some["line"], some["reason"], some["set"]) for some in gone] == [(7, reason, "set")]
    assert gone[0]["record"] == (bad if kind == "json" else json.loads(bad))


def test_sound_records_stay() -> None:
    for text in (
        PROSE,
        "yes",
        "17",
        "0.5",
        "1,000,000,000",
        "<box>[[1, 2, 3, 4]]</box>",
        "```\nfor a in b:\n    c()\n```",
    ):
        assert Rules()._answer(text, "set") is None


@pytest.mark.parametrize("duplicates", ["none", "line", "question"])
@pytest.mark.parametrize("workers", [0, 2])
def test_duplicates(tmp_path: Path, duplicates: Any, workers: int) -> None:
    lines = [
        line(0),
        line(1),
        line(0),
        line(9, "Another.", "What is 1?"),
        line(2, image="a"),
        line(3, image="b", question="What is 2?"),
    ]
    kept, _ = run(tmp_path, lines, Rules(duplicates=duplicates), workers=workers)
    gone = {"none": (), "line": (2,), "question": (2, 3)}[duplicates]
    assert kept == [text for n, text in enumerate(lines) if n not in gone]


pieces = st.sampled_from([*(bad for _, bad in GONE.values()), *(line(n) for n in range(5)), line(9, PROSE), "[]", "猫"])


@given(st.lists(pieces, min_size=1, max_size=12))
def test_kept_and_rejected_are_the_given_lines_and_a_second_pass_keeps_all(lines: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        kept, gone = run(folder, lines)
        originals = [lines[some["line"] - 1] for some in gone]
        assert sorted(kept + originals) == sorted(lines)
        if kept:
            again, none = run(folder, kept)
            assert again == kept
            assert none == []


# scores


def test_scores_in_a_field_decide(tmp_path: Path) -> None:
    rules = Rules(quality_field="quality", repetition_field="loops")
    lines = [
        line(0, quality=7, loops=3),
        line(1, quality=6.9),
        line(2, quality=9, loops=2.5),
        line(3, image="a.jpg", quality=1),  # the paper scores the quality of text only
        line(4, image="a.jpg", loops=0),
        line(5, quality="8"),
        line(6, quality=11),
        line(7),
    ]
    kept, gone = run(tmp_path, lines, rules)
    assert kept == [lines[0], lines[3], lines[7]]
    assert [(some["line"], some["reason"]) for some in gone] == [
        (2, "quality_score"), (3, "repetition_score"), (5, "repetition_score"), (6, "bad_score"), (7, "bad_score"),
    ]  # fmt: skip
    assert gone[0]["message"] == "quality 6.9; the least is 7"
    out = tmp_path / "counted"
    (report,) = filter_sets([write(tmp_path, lines)], out, rules)
    assert (report.given, report.kept, report.unscored) == (8, 3, 2)


def test_exempt_sets_are_not_searched_for_repetition(tmp_path: Path) -> None:
    lines = [line(0, "wait " * 60, loops=0), line(1, "1" + "0" * 99)]
    kept, _ = run(tmp_path, lines, Rules(repetition_field="loops", exempt=("set",)))
    assert kept == lines[:1]
    with pytest.raises(ValueError, match="exempt names 'sett', which is no set; there are set"):
        run(tmp_path, lines, Rules(exempt=("sett",)))
    (tmp_path / "many").mkdir()
    shard = replace(write(tmp_path, lines, "many/a"), entry="many")  # a file of an entry with a pattern
    (report,) = filter_sets([shard], tmp_path / "of_an_entry", Rules(repetition_field="loops", exempt=("many",)))
    assert report.kept == 1


def test_a_model_is_asked_for_scores_that_nobody_gave(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(prompts: Sequence[str]) -> list[str]:
        asked.extend(prompts)
        return ["2" if "bad" in some else "no idea" if "odd" in some else "Score: 8.5/10" for some in prompts]

    lines = [
        line(0),
        line(1, "bad"),
        line(2, "odd"),
        line(3, image="a.jpg"),
        line(4, quality=9),
        line(5, "wait, " * 60),
    ]
    out = tmp_path / "out"
    (report,) = filter_sets([write(tmp_path, lines)], out, Rules(quality_field="quality"), Judge(ask))
    assert (report.kept, report.unscored, dict(report.rejected)) == (4, 1, {"quality_score": 1, "repeats": 1})
    assert len(asked) == 2 + 2 + 2 + 1 + 1  # quality of text without a score, repetition of all that the rules left
    assert "user: What is 0?\nassistant: A cat." in asked[0]
    assert "(picture)" in asked[6]


def test_prompts_need_a_place_for_the_conversation() -> None:
    with pytest.raises(ValueError, match=r"the prompt for quality has no \{conversation\}"):
        Judge(lambda prompts: [], {**PROMPTS, "quality": "Good?"})


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7.0),
        ("Score: 8.5/10", 8.5),
        ("10", 10.0),
        ("12", None),
        ("none", None),
        ("", None),
        ("0", 0.0),
        ("I give 3.", 3.0),
    ],
)
def test_scores_are_read_from_answers(answer: str, score: float | None) -> None:
    assert parse_score(answer) == score


# files


def test_what_is_kept_is_a_meta_json_of_its_own(tmp_path: Path) -> None:
    sets = [
        write(tmp_path, [line(0), "{"], "a/../b", augment=True, max_tiles=4, repeat=0.5),
        write(tmp_path, ["{"], "none"),
        write(tmp_path, [line(0), line(1)], "a_b"),
    ]
    out = tmp_path / "deep" / "out"
    filter_sets(sets, out, Rules())
    found = read_sets(out / "meta.json")
    assert [(some.name, some.augment, some.max_tiles, some.repeat, some.length) for some in found] == [
        ("a/../b", True, 4, 0.5, 1), ("a_b", False, None, 1.0, 1),
    ]  # fmt: skip
    assert [len(some.lines) for some in found] == [1, 1]  # the third's first record is the first's
    assert all(some.root == str(tmp_path) for some in found)
    assert all(path.parent == out for path in out.rglob("*"))
    assert not list(out.glob(".*"))
    counts = json.loads((out / "counts.json").read_text())
    assert all(some["given"] == some["kept"] + sum(some["rejected"].values()) for some in counts.values())
    with pytest.raises(ValueError, match=r"counts.json exists; give a folder that is new"):
        filter_sets(sets, out, Rules())


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path, [line(n) for n in range(5)] + ["{"])
    words = ["filter", data.annotation, "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "one"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["set"] == {"name": "set", "given": 6, "kept": 5, "rejected": {"json": 1}, "unscored": 0}
    assert main([*words, "--out", str(tmp_path / "two"), "--rules.longest", "3"]) == 0
    assert "nothing was kept" in capsys.readouterr().out
    assert main([]) == 2
    assert "filter" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no verb 'x'"):
        main(["x"])


@pytest.mark.parametrize("settings", [{"quality": 11}, {"repetition": -1}, {"shortest": 9, "longest": 3}])
def test_impossible_rules_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"scores are 0 to 10|1 <= shortest"):
        Rules(**settings)
