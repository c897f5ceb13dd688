"""Records by position: an index that is kept and renewed, damage by line, JSONL, tar and parquet alike."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl.data.lines import Lines
from internvl.data.mixture import DataSet, Mixture, read_sets
from internvl.data.records import load_line
from internvl.data.shards import write_tar
from internvl.data.sources import JsonLines, ParquetRecords, TarRecords, open_records

TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"id": n, "conversations": TALK}) + "\n" for n in range(count)))
    return path


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (shade,) * 3).save(file, "png")
    return file.getvalue()


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 5)
    assert len(Lines(str(path))) == 5
    (kept,) = (tmp_path / "cache" / "lines").glob("*.npy")
    made = kept.stat().st_mtime_ns
    lines = Lines(str(path))
    assert kept.stat().st_mtime_ns == made
    assert isinstance(lines.index, np.memmap)  # on disk, not in memory
    write(path, 7)
    assert len(Lines(str(path))) == 7
    os.utime(path, (1, 1))
    assert len(Lines(str(path))) == 7
    assert len(list((tmp_path / "cache" / "lines").glob("*.npy"))) == 3


def test_windows_of_the_file_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b"{}", b"", b"x" * 50, b"\r", b"y" * 9, b"", b"[1]"]))
    for window in (1, 3, 8, 64):
        monkeypatch.setattr("internvl.data.lines._WINDOW", window)
        os.utime(path, (window, window))
        lines = Lines(str(path))
        assert lines.numbers.tolist() == [1, 3, 5, 7]
        assert [lines.read(at).strip() for at in range(len(lines))] == [b"{}", b"x" * 50, b"y" * 9, b"[1]"]


def test_a_set_costs_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20_000)
    lines = Lines(str(path))
    lines.read(0)
    assert len(pickle.dumps(lines)) < 500  # a worker gets the name of the index, not a copy
    assert Mixture([DataSet(str(path))]).epoch(0).dtype == np.int32


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"conversations": TALK})
    path.write_text(f"{good}\n\n{{broken\n{good}")
    records = open_records(str(path))
    assert len(records) == 3
    assert records.record(2).source == f"{path}:4"
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not a JSON line"):
        records.record(1)


def test_a_file_that_is_no_jsonl_is_named_once(tmp_path: Path) -> None:
    records = [{"id": n, "conversations": TALK} for n in range(3)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path = tmp_path / "a.jsonl"
    for text in (json.dumps(records), json.dumps(records, indent=1), json.dumps(records[0], indent=1)):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"a\.jsonl: one JSON value over the whole file; JSONL has an object on each"
        ):
            open_records(str(path))
    path.write_text(lines, encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.jsonl: UTF-16; JSONL is UTF-8; convert it"):
        open_records(str(path))
    path.write_text("[\n" + lines)
    assert len(open_records(str(path))) == 4  # one bad line among good ones is a bad record


def test_a_line_is_utf_8_wherever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = json.dumps({"conversations": TALK})
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n" + text.encode("utf-16-le") + b"\n")
    records = open_records(str(path))
    assert records.record(0).turns[1].text == "that"
    assert isinstance(records, JsonLines)
    for line in (records.lines.read(1), records.lines.read(1).strip()):  # whole, and as the check of a set reads it
        with pytest.raises(ValueError, match="not a JSON line"):
            load_line(line)


def test_a_tar_is_read_at_any_place(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    samples: list[tuple[str, dict[str, bytes]]] = []
    for number in range(4):
        talk = {"id": number, "image": "lost.png", "conversations": TALK}
        samples.append((f"s{number}", {"png": png(number), "json": json.dumps(talk).encode()}))
    two = {"conversations": [{"from": "human", "value": "<image><image>?"}, TALK[1]]}
    samples.append(("two", {"0.png": png(8), "1.png": png(9), "json": json.dumps(two).encode()}))
    samples.append(("text", {"json": json.dumps({"conversations": TALK}).encode()}))
    samples.append(("bad", {"json": b"{"}))
    samples.append(("none", {"png": png(1)}))
    write_tar(path, samples)
    records = pickle.loads(pickle.dumps(open_records(str(path))))
    assert isinstance(records, TarRecords)
    assert len(records) == 8
    for position in (3, 0, 2):
        record = records.record(position)
        assert record.images == (png(position),)
        assert record.id == str(position)
        assert record.turns[0].text == "<image>\nwhat?"
    assert records.record(4).images == (png(8), png(9))
    assert records.record(5).kind == "text"
    with pytest.raises(ValueError, match=r"shard\.tar:bad: not JSON"):
        records.record(6)
    with pytest.raises(ValueError, match=r"shard\.tar:none: fields png; a record has one of json"):
        records.record(7)


def test_a_digest_follows_the_content(tmp_path: Path) -> None:
    """Not the name and not the date of a file; of a tar its members and some records."""

    def written(name: str, word: str) -> str:
        talk = {"conversations": [TALK[0], {"from": "gpt", "value": word}]}
        if name.endswith(".tar"):
            write_tar(tmp_path / name, [("a", {"json": json.dumps(talk).encode()})])
        else:
            (tmp_path / name).write_text(json.dumps(talk) + "\n")
        return open_records(str(tmp_path / name)).digest()

    for suffix in (".jsonl", ".tar"):
        first = written(f"a{suffix}", "that")
        assert first == written(f"b{suffix}", "that")
        assert first != written(f"c{suffix}", "this")
        assert first != written(f"d{suffix}", "this and that")
    for kept in (tmp_path / "cache" / "lines").glob("*.digest"):  # an index of an earlier version has none
        kept.unlink()
    assert open_records(str(tmp_path / "a.jsonl")).digest()


def test_bad_tars_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"bad\.tar: truncated or damaged"):
        open_records(str(tmp_path / "bad.tar"))
    with pytest.raises(ValueError, match="unpack it"):
        open_records("a.tar.gz")
    with pytest.raises(FileNotFoundError, match="no such file; check `annotation`"):
        open_records("gone.tar")


class FakeParquet(ModuleType):
    """As much of pyarrow.parquet as the reader asks for: two row groups."""

    def __init__(self, groups: list[list[dict[str, Any]]]) -> None:
        super().__init__("pyarrow.parquet")
        self.groups, self.read = groups, list[int]()

    def ParquetFile(self, path: str) -> Any:
        import contextlib

        def read(number: int) -> Any:
            self.read.append(number)
            return SimpleNamespace(to_pylist=lambda: self.groups[number])

        groups = self.groups
        metadata = SimpleNamespace(
            num_row_groups=len(groups), row_group=lambda number: SimpleNamespace(num_rows=len(groups[number]))
        )
        return contextlib.nullcontext(SimpleNamespace(metadata=metadata, read_row_group=read))


def rows() -> list[dict[str, Any]]:
    return [
        {"id": "a", "conversations": TALK, "image": {"bytes": png(1), "path": "x.png"}},
        {"id": "b", "conversations": json.dumps(TALK), "image": {"bytes": None, "path": "x.png"}},
        {"id": "c", "conversations": TALK, "image": None},
        {"id": "d", "conversations": TALK, "images": [{"bytes": None, "path": None}]},
        {"id": "e", "conversations": "{", "image": None},
    ]


def check_rows(records: ParquetRecords, path: Path) -> None:
    assert len(records) == 5
    assert records.record(0).images == (png(1),)
    assert records.record(1).images == ("root/x.png",)
    assert records.record(2).kind == "text"
    with pytest.raises(ValueError, match=r"row 4: picture 0 is empty"):
        records.record(3)
    with pytest.raises(ValueError, match=r"row 5: not JSON"):
        records.record(4)


def test_parquet_rows_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    fake = FakeParquet([rows()[:2], rows()[2:]])
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake)
    records = open_records(str(path), "root")
    assert isinstance(records, ParquetRecords)
    check_rows(records, path)
    assert fake.read == [0, 1]  # a row group stays until another is needed
    assert len(pickle.dumps(records)) < 2000
    digests = []
    for footer in (b"statistics", b"others", b"statistics"):
        path.write_bytes(b"PAR1rows" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        digests.append(open_records(str(path), "root").digest())
    assert digests[0] == digests[2] != digests[1]


def test_parquet_rows_of_a_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    whole = [{**row, "conversations": json.dumps(TALK) if row["id"] != "e" else "{"} for row in rows()]
    parquet.write_table(pyarrow.Table.from_pylist(whole), path, row_group_size=2)
    check_rows(ParquetRecords(str(path), "root"), path)


def test_parquet_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"internvl\[parquet\]"):
        open_records(str(tmp_path / "a.parquet"))


def test_shards_by_pattern_are_sets(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"s{number}.tar", [("a", {"json": json.dumps({"conversations": TALK}).encode()})])
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"web": {"annotation": "s*.tar", "repeat_time": 2, "length": 3}}))
    sets = read_sets(meta)
    assert [data.name for data in sets] == ["web/s0.tar", "web/s1.tar", "web/s2.tar"]
    assert Mixture(sets).epoch(0).tolist().count(1) == 2
    meta.write_text(json.dumps({"web": {"annotation": "s*.tar", "length": 4}}))
    with pytest.raises(ValueError, match="`length` is 4 but 3 files have 3 records"):
        read_sets(meta)
    meta.write_text(json.dumps({"web": {"annotation": "t*.tar"}}))
    with pytest.raises(FileNotFoundError, match=r"no file is called t\*\.tar"):
        read_sets(meta)


def test_a_wrong_length_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 5)
    assert len(Mixture([DataSet(str(path), length=5)])) == 5
    with pytest.raises(ValueError, match=r"`length` is 6 but .* has 5 records"):
        Mixture([DataSet(str(path), name="mine", length=6)])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"repeat_time": "two"}, "mine: `repeat_time` is 'two'; give a number"),
        ({"repeat_time": -1}, "mine: repeat_time -1.0; it must be above 0"),
        ({"max_dynamic_patch": 2.5}, "mine: `max_dynamic_patch` is 2.5; give a whole number"),
        ({"max_dynamic_patch": 0}, "mine: max_dynamic_patch 0; it must be at least 1"),
        ({"length": True}, "mine: `length` is True"),
        ({"data_augment": "false"}, "mine: `data_augment` is 'false'; give true or false"),
        ({"root": 5}, "mine: `root` is 5; give the folder"),
        ({"repeat_tme": 3}, "mine: no field is called 'repeat_tme'; is 'repeat_time' meant?"),
        ({"repeat_time": 0}, "mine: repeat_time 0.0; it must be above 0: to leave a set out, remove it"),
    ],
)
def test_bad_numbers_in_a_meta_file_are_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.jsonl", 2)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"mine": {"annotation": "a.jsonl", **entry}}))
    with pytest.raises(ValueError, match=message):
        read_sets(meta)


def test_no_root_is_the_folder_of_the_meta_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 2)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"mine": {"annotation": "a.jsonl", "root": None, "data_augment": None}}))
    meta_without = tmp_path / "without.json"
    meta_without.write_text(json.dumps({"mine": {"annotation": "a.jsonl"}}))
    assert read_sets(meta) == read_sets(meta_without)


def test_a_set_that_stands_twice_is_not_lost_in_silence(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 2)
    meta = tmp_path / "meta.json"
    meta.write_text('{"mine": {"annotation": "a.jsonl"}, "mine": {"annotation": "a.jsonl", "repeat_time": 2}}')
    with pytest.raises(ValueError, match="'mine' stands twice in one object; rename or remove one"):
        read_sets(meta)


def test_what_is_no_meta_file_is_named(tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    with pytest.raises(FileNotFoundError, match=r"meta\.json: no such file; give a meta JSON"):
        read_sets(meta)
    meta.write_text('[{"conversations": []}]')
    with pytest.raises(ValueError, match="a JSON list is not a meta JSON; records stand one a line"):
        read_sets(meta)


def test_other_fields_of_an_entry_are_told(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 2)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"mine": {"annotation": "a.jsonl", "media_root": "p", "note": "x"}}))
    assert read_sets(meta)[0].ignored == ("media_root", "note")


def test_an_epoch_has_a_limit_and_some_of_every_set(tmp_path: Path) -> None:
    one, two = (DataSet(str(write(tmp_path / f"{name}.jsonl", 5)), name=name) for name in "ab")
    with pytest.raises(
        ValueError, match=r"an epoch of 5,000,000,000,005 records; the limit is .* of a, which is 1e\+12"
    ):
        Mixture([replace(one, repeat=1e12), two])
    with pytest.raises(ValueError, match=r"a: repeat_time 0\.05 of 5 records is none in an epoch; raise it"):
        Mixture([replace(one, repeat=0.05), two])
    assert Mixture([replace(one, repeat=0.1 + 1e-9), two]).entries == 6


def test_only_jsonl_has_lines(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a", {"json": b"{}"})])
    with pytest.raises(ValueError, match="lines are those of a JSONL file"):
        _ = DataSet(str(tmp_path / "s.tar")).lines
    assert isinstance(DataSet(str(write(tmp_path / "a.jsonl", 1))).records, JsonLines)
