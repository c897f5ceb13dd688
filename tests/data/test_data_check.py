"""`internvl data check` finds each damage that was put in, says where, and is quiet about sound sets."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from internvl.cli import VERBS
from internvl.commands.data import main
from internvl.data.check import Checks, check
from internvl.data.duplicates import repeated
from internvl.data.encode import Encoder
from internvl.data.findings import spread
from internvl.data.loader import Loader
from internvl.data.mixture import DataSet, read_sets
from internvl.data.report import bar, histogram, tell, to_html
from internvl.train.recipes import tiny
from tiny import tiny_chat_config, tiny_tokenizer

ENCODER = Encoder(tiny_tokenizer(), tiny_chat_config(max_tiles=4), max_length=400)


def line(number: int, answer: str = "A cat.", question: str = "", **more: Any) -> str:
    turns = [{"from": "human", "value": question or f"What is {number}?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": number, "conversations": turns, **more})


def write(folder: Path, lines: list[str], name: str = "set", **more: Any) -> DataSet:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return DataSet(str(path), str(folder), name, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.jpg", quality=95)
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    return tmp_path


def sound(count: int) -> list[str]:
    return [line(n, image="a.png" if n % 2 else "b.jpg", width=60, height=40) for n in range(count)]


def found(report: Any) -> list[tuple[int, str]]:
    return [(some.line, some.reason) for some in report.findings]


def test_a_sound_set_has_no_findings(folder: Path) -> None:
    report = check([write(folder, sound(30), length=30)], ENCODER, Checks(decode=True))
    assert report.findings == []
    assert report.wrong() == 0
    (made,) = report.sets
    assert (made.given, made.accepted, made.rejected, dict(made.kinds)) == (30, 30, 0, {"image": 30})


DAMAGE: dict[str, tuple[str, Any]] = {
    "json": ("json", "{broken"),
    "list": ("json", "[1, 2]"),
    "schema": ("fields", '{"conversations": 5}'),
    "role": ("fields", line(0).replace("gpt", "me")),
    "order": ("roles", line(0).replace("human", "gpt")),
    "empty": ("empty", line(0, answer="  ")),
    "marks": ("marks", line(0, question="<image><image>", image="a.png")),
    "no picture": ("marks", line(0, question="<image>")),
    "surrogate": ("text", line(0).replace("A cat", "\\ud800")),
    "missing": ("missing", line(0, image="gone.png")),
    "folder": ("missing", line(0, image=".")),
    "no image": ("unreadable", line(0, image="set.jsonl")),
    "too long": ("too_long", line(0, answer=" ".join(map(str, range(150))))),
    "repeats": ("repeats", line(0, answer="ha" * 60)),
    "size": ("declared_size", line(0, image="a.png", width=61, height=40)),
    "sizes": ("declared_size", line(0, image="a.png", width_list=[60, 60], height_list=[40, 40])),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_found_at_its_line(folder: Path, kind: str) -> None:
    reason, bad = DAMAGE[kind]
    lines = sound(9)
    lines[4] = bad
    report = check([write(folder, lines)], ENCODER)
    assert found(report) == [(5, reason)]
    assert report.wrong() == 1
    assert report.wrong([reason]) == 0
    (some,) = report.findings
    assert some.file.endswith("set.jsonl")
    assert some.message


def test_pixels_are_read_only_when_asked(folder: Path) -> None:
    lines = [*sound(3), line(3, image="half.jpg")]
    assert found(check([write(folder, lines)], ENCODER)) == []
    assert found(check([write(folder, lines)], ENCODER, Checks(decode=True))) == [(4, "unreadable")]


def test_what_is_told_is_not_wrong(folder: Path) -> None:
    lines = [line(0, length=3), line(1, "one", "Same?"), line(2, "two", "Same?")]
    report = check([write(folder, lines)], ENCODER)
    assert found(report) == [(1, "declared_tokens"), (3, "same_question")]
    assert report.wrong() == 0
    cutting = replace(ENCODER, overlong="cut")
    report = check([write(folder, [*sound(2), DAMAGE["too long"][1]])], cutting)
    assert found(report) == [(3, "cut")]
    assert (report.wrong(), report.sets[0].accepted, report.sets[0].over) == (0, 3, 1)


def test_equal_lines_are_found_across_sets(folder: Path) -> None:
    first, second = sound(6), [line(100), sound(6)[3], "{broken", "{broken"]
    sets = [write(folder, first, "first"), write(folder, second, "second")]
    report = check(sets, ENCODER)
    said = [
        (some.name, some.line, some.reason, Path(some.message).name)
        for some in report.findings
        if some.reason != "json"
    ]
    assert said == [("second", 2, "same_line", "first.jsonl:4"), ("second", 4, "same_line", "second.jsonl:3")]


def test_numbers_of_the_meta_json_are_compared(folder: Path) -> None:
    write(folder, sound(5))
    meta = folder / "meta.json"
    meta.write_text(
        json.dumps({"set": {"root": "", "annotation": "set.jsonl", "length": 6}, "no": {"annotation": "x.jsonl"}})
    )
    report = check(read_sets(meta), ENCODER)
    assert found(report) == [(0, "declared_length"), (0, "missing")]
    assert "6 records" in report.findings[0].message
    assert "the file has 5" in report.findings[0].message


def test_records_of_a_tar_are_checked_and_set_aside_by_member(folder: Path) -> None:
    """Pictures are inside the file; a record has no line of its own."""
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as shard:
        for name, text in (("a", line(0)), ("b", "{broken"), ("c", line(2, "ha" * 60)), ("d", line(3))):
            picture = (folder / ("half.jpg" if name == "d" else "a.png")).read_bytes()
            for member, content in ((f"{name}.json", text.encode()), (f"{name}.png", picture)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    data = DataSet(str(path), "", "shard")
    report = check([data], ENCODER, Checks(decode=True))
    assert [(some.line, some.reason) for some in report.findings] == [
        ("b", "json"),
        ("c", "repeats"),
        ("d", "unreadable"),
    ]
    assert report.sets[0].accepted == 2
    aside = folder / "quarantine.jsonl"
    loader = Loader([data], ENCODER, 0, on_error="quarantine", quarantine=aside)
    for _ in range(2):  # each record once
        list(loader.once())
    entries = [json.loads(row) for row in aside.read_text().splitlines()]
    told = {(some["file"], some["line"], some["reason"], some["record"]) for some in entries}
    assert told == {(str(path), "b", "json", None), (str(path), "d", "unreadable", None)}
    assert len(entries) == 2


def test_fields_that_nothing_reads_are_named(folder: Path) -> None:
    report = check([write(folder, [line(0, videos="a.mp4"), line(1, task="x"), line(2, task="y")])], ENCODER)
    assert report.sets[0].ignored == Counter(task=2, videos=1)


def test_sizes_are_those_of_encoding(folder: Path) -> None:
    lines = [*sound(7), line(8), line(9, image=["a.png", "b.jpg"], question="<image><image>?")]
    data = write(folder, lines)
    (made,) = check([data], ENCODER).sets
    samples = [ENCODER.encode(data.record(position)) for position in range(len(lines))]
    assert made.sizes.tolist() == [[len(some.input_ids), some.num_tiles, some.num_learned] for some in samples]


def test_the_number_of_workers_changes_nothing(folder: Path) -> None:
    lines = [*(bad for _, bad in DAMAGE.values()), *sound(600), *sound(20)]
    sets = [write(folder, lines), write(folder, sound(5), "other")]
    seen: list[int] = []
    alone = check(sets, ENCODER, on_progress=seen.append).to_json()
    assert sum(seen) == len(lines) + 5
    assert check(sets, ENCODER, Checks(workers=2)).to_json() == alone
    assert alone["given"] == alone["accepted"] + alone["rejected"] == len(lines) + 5


@given(st.lists(st.integers(0, 6)))
def test_repeats_are_later_places_of_an_equal_digest(values: list[int]) -> None:
    expected = [(n, values.index(v)) for n, v in enumerate(values) if v and values.index(v) < n]
    assert list(repeated(np.asarray(values, np.uint64))) == expected


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_histograms_hold_every_value(values: list[int]) -> None:
    array = np.asarray(values, np.int32)
    counts, edges = histogram(array)
    assert sum(counts) == len(values)
    assert (edges[0], edges[-1]) == (min(values), max(values) + 1)
    assert len(bar(array)) <= 16
    told = spread(array)
    assert (told["min"], told["max"], told["sum"]) == (min(values), max(values), sum(values))
    assert told["median"] in values


def test_reports_are_harmless_and_complete(folder: Path) -> None:
    name = "<script>alert(1)</script>[bold]"
    lines = [line(0, image="<b>\x1b[31m.png"), line(1, **{"<i>": 1}), *sound(3)]
    report = check([replace(write(folder, lines), name=name)], ENCODER)
    page = to_html(report, "<title>")
    assert "<script>" not in page
    assert "<i>" not in page
    assert "\x1b" not in page
    assert page.count("<svg") == 3
    console = Console(width=200, record=True, file=open("/dev/null", "w"), highlight=False, markup=False)  # noqa: SIM115
    tell(report, console)
    text = console.export_text()
    assert "[bold]" in text
    assert "missing" in text
    assert "\x1b" not in text


# the command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    run = tiny.tiny_sft()
    data = replace(run.data, meta=str(folder / "records.jsonl"), held_out=str(folder / "held_out.jsonl"))
    run = replace(run, model=str(folder / "model"), data=data)
    tiny.prepare(run, own=run)
    return folder


def test_the_command_ends_with_1_when_something_is_wrong(inputs: Path, capsys: Any) -> None:
    words = ["check", str(inputs / "records.jsonl"), "--model", str(inputs / "model"), "--workers", "0"]
    allow = ["--allow", "same_line", "repeats", "declared_size", "declared_length"]
    assert main([*words, *allow]) == 0
    assert "accepted + 0 rejected; nothing wrong" in capsys.readouterr().out.replace("\n", " ")
    lines = (inputs / "records.jsonl").read_text().splitlines(keepends=True)
    bad = inputs / "bad.jsonl"
    bad.write_text("".join([*lines[:3], "{broken\n", *lines[3:]]))
    page = inputs / "page.html"
    assert main(["check", str(bad), *words[2:], *allow, "--json", "--html", str(page), "--max-tiles", "2"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["given"], told["rejected"], told["wrong"]) == (len(lines) + 1, 1, 1)
    assert [(some["line"], some["reason"]) for some in told["findings"] if some["reason"] == "json"] == [(4, "json")]
    assert "Data check: bad.jsonl" in page.read_text()


def test_the_help_of_the_command_line_names_every_verb_of_data(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)
    assert listed is not None
    verbs = set(listed[1].split(","))
    assert {"collect", "build", "dual", "show", "check"} <= verbs
    assert verbs <= set(re.findall(r"\w+", VERBS["data"]))


def test_show_draws_a_sheet_of_records(inputs: Path, capsys: Any) -> None:
    file, out = str(inputs / "records.jsonl"), inputs / "sheet.png"
    assert main(["show", file, "--number", "7", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as drawn:
        wide, high = drawn.size
        first = drawn.tobytes()
    assert main(["show", file, "--number", "1", "--out", str(out)]) == 0
    with Image.open(out) as drawn:
        assert drawn.width == wide
        assert drawn.height < high  # one row of panels instead of two
    assert main(["show", file, "--number", "7", "--seed", "5", "--out", str(out)]) == 0
    with Image.open(out) as drawn:
        assert drawn.tobytes() != first
    with pytest.raises(ValueError, match=r"none.jsonl is not a file; give a JSONL file"):
        main(["show", str(inputs / "none.jsonl")])


def test_show_takes_the_set_of_a_meta_file(inputs: Path, capsys: Any) -> None:
    meta = inputs / "two.json"
    entry = {"root": str(inputs), "annotation": str(inputs / "records.jsonl"), "repeat_time": 1}
    meta.write_text(json.dumps({"one": entry, "other": {**entry, "annotation": str(inputs / "held_out.jsonl")}}))
    said = []
    for name in ("one", "other"):
        words = ["show", str(meta), "--set", name, "--line", "1", "--model", str(inputs / "model")]
        assert main(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    with pytest.raises(ValueError, match=r"--set third: .* has one, other"):
        main(["show", str(meta), "--set", "third", "--line", "1", "--model", str(inputs / "model")])


def test_show_prints_and_writes_one_sample(inputs: Path, capsys: Any) -> None:
    words = ["show", str(inputs / "records.jsonl"), "--line", "1", "--model", str(inputs / "model")]
    assert main(words) == 0
    assert "[[" in capsys.readouterr().out
    for name in ("one.png", "one.html"):
        assert main([*words, "--out", str(inputs / name)]) == 0
        assert (inputs / name).stat().st_size > 1000
    with pytest.raises(ValueError, match="lines 1 to"):
        main([*words[:3], "9999", *words[4:]])
    with pytest.raises(ValueError, match=r"is written as .png or .html"):
        main([*words, "--out", "x.jpg"])
    with pytest.raises(ValueError, match=r"--set nothing: .* has records"):
        main([*words, "--set", "nothing"])
