"""Records by position, whatever file they are in: JSONL, parquet, webdataset tar. One face for all.

Reading in order, and telling damage by member, is shards.py's; here any record is found without those before it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, runtime_checkable

from internvl.data.lines import Lines
from internvl.data.records import Record, RecordError, parse_line, parse_record
from internvl.data.shards import MAX_MEMBER_BYTES, PICTURE_FIELDS

RECORD_FIELDS = ("json", "jsonl")
"""Members of a tar that hold the record."""


_READ_FOR_DIGEST = 64
"""Records of a tar."""


@runtime_checkable
class Records(Protocol):
    """Records of a file, found by position."""

    def __len__(self) -> int: ...

    def record(self, position: int) -> Record:
        """ValueError with file and place where it cannot be used."""

    def source(self, position: int) -> str:
        """File and place, for messages."""

    def digest(self) -> str:
        """Another one where the file says something else; it may be moved and copied."""


def open_records(path: str, root: str = "") -> Records:
    """The records of a file, by how its name ends."""
    if path.endswith(".parquet"):
        return ParquetRecords(path, root)
    if path.endswith(".tar"):
        return TarRecords(path, root)
    if path.endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{path}: a packed tar cannot be read at any place; unpack it to a .tar first")
    return JsonLines(path, root)


class JsonLines:
    """A line is a record (spec 5.2)."""

    def __init__(self, path: str, root: str = "") -> None:
        self.path, self.root, self.lines = path, root, Lines(path)
        self._check_form()

    def _check_form(self) -> None:
        """ValueError for a file that is no JSONL at all: told once, not for every line."""
        first = self.lines.read(0)
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in first:
            said = "UTF-16; JSONL is UTF-8; convert it, such as by: iconv -f UTF-16 -t UTF-8"
            raise RecordError("json", f"{self.path}: {said}")
        start = first.removeprefix(codecs.BOM_UTF8).strip()
        second = self.lines.read(1).strip() if len(self.lines) > 1 else b""
        list_of_lines = start == b"[" and second.startswith(b"{") and not second.endswith(b"}")
        spread_out = list_of_lines or (start == b"{" and second.startswith(b'"'))
        if spread_out or (len(self.lines) == 1 and start.startswith(b"[") and start[1:].lstrip().startswith(b"{")):
            said = "one JSON value over the whole file; JSONL has an object on each line"
            raise RecordError("json", f"{self.path}: {said}; of a list they are written by: jq -c '.[]'")

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, position: int) -> Record:
        return parse_line(self.lines.read(position), self.root, self.source(position))

    def source(self, position: int) -> str:
        return f"{self.path}:{self.lines.numbers[position]}"

    def digest(self) -> str:
        return self.lines.digest()


class ParquetRecords:
    """A row is a record: `conversations` as a list or as JSON; pictures as paths, bytes or {"bytes", "path"}."""

    def __init__(self, path: str, root: str = "") -> None:
        self.path, self.root = path, root
        self._group: tuple[int, int, list[dict[str, Any]]] | None = None
        groups = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        self.bounds = [sum(groups[:number]) for number in range(len(groups) + 1)]
        if not self.bounds[-1]:
            raise ValueError(f"{path}: no rows; a data set needs at least one record")

    @cached_property
    def _metadata(self) -> Any:
        parquet = _parquet()
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.path}: no such file; check `annotation` in the meta JSON")
        try:
            with parquet.ParquetFile(self.path) as file:
                return file.metadata
        except (ValueError, OSError) as error:  # pyarrow's own errors are of these
            raise ValueError(f"{self.path}: damaged ({error}); fetch the file again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_metadata"} | {"_group": None}

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def record(self, position: int) -> Record:
        source = self.source(position)
        row = dict(self._row(position))
        if isinstance(row.get("conversations"), str):
            row["conversations"] = _json(row["conversations"], source)
        pictures = [row.pop(name) for name in ("image", "images") if row.get(name) is not None]
        flat = [one for value in pictures for one in (value if isinstance(value, list) else [value])]
        return _with_pictures(row, flat, self.root, source)

    def source(self, position: int) -> str:
        return f"{self.path}: row {position + 1}"

    def digest(self) -> str:
        """Of the footer, which holds places, sizes and extremes of all columns, not of the rows."""
        with open(self.path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            return _digest([str(file.tell()).encode(), file.read(length)])

    def _row(self, position: int) -> dict[str, Any]:
        """Row groups are what can be read alone; the last one stays."""
        number = bisect_right(self.bounds, position) - 1
        if self._group is None or self._group[:2] != (os.getpid(), number):
            with _parquet().ParquetFile(self.path) as file:
                self._group = os.getpid(), number, file.read_row_group(number).to_pylist()
        row: dict[str, Any] = self._group[2][position - self.bounds[number]]
        return row


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError("parquet files need: pip install 'internvl[parquet]'") from error
    return parquet


class _Member(NamedTuple):
    field: str
    offset: int
    size: int


class TarRecords:
    """A webdataset tar: members of one name are a record, its `json` the conversation, its pictures in member order."""

    def __init__(self, path: str, root: str = "") -> None:
        self.path, self.root = path, root
        self._file: tuple[int, int] | None = None
        self._keys, self._members = _members(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self._keys)

    def record(self, position: int) -> Record:
        source, members = self.source(position), self._members[position]
        texts = [member for member in members if member.field in RECORD_FIELDS]
        if len(texts) != 1:
            fields = ", ".join(member.field for member in members)
            raise RecordError("fields", f"{source}: fields {fields}; a record has one of {', '.join(RECORD_FIELDS)}")
        data = _json(self._read(texts[0], source), source)
        if not isinstance(data, dict):
            said = f"a JSON {type(data).__name__}; a record is an object with `conversations`"
            raise RecordError("json", f"{source}: {said}")
        pictures = [member for member in members if member.field.rpartition(".")[2] in PICTURE_FIELDS]
        if not pictures:
            return parse_record(data, self.root, source)
        data.pop("image", None)  # the name it had before it was packed
        return _with_pictures(data, [self._read(member, source) for member in pictures], self.root, source)

    def source(self, position: int) -> str:
        return f"{self.path}:{self._keys[position]}"

    def digest(self) -> str:
        """Of names, places and sizes of all members, and of some records: a changed word in another one is not seen."""
        some = range(0, len(self), -(-len(self) // _READ_FOR_DIGEST))
        texts = (m for position in some for m in self._members[position] if m.field in RECORD_FIELDS)
        return _digest([repr((self._keys, self._members)).encode(), *(self._read(text, self.path) for text in texts)])

    def _read(self, member: _Member, source: str) -> bytes:
        if member.size > MAX_MEMBER_BYTES:
            raise ValueError(f"{source}: a member of {member.size} bytes; the limit is {MAX_MEMBER_BYTES}; split it")
        if self._file is None or self._file[0] != os.getpid():
            self._file = os.getpid(), os.open(self.path, os.O_RDONLY)
        content = os.pread(self._file[1], member.size, member.offset)
        if len(content) < member.size:
            raise ValueError(f"{source}: {len(content)} of {member.size} bytes; fetch the shard again")
        return content


@lru_cache(maxsize=64)
def _members(path: str) -> tuple[list[str], list[tuple[_Member, ...]]]:
    """Keys and members of a tar, from its headers alone."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; check `annotation` in the meta JSON")
    keys: list[str] = []
    found: list[list[_Member]] = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                name = PurePosixPath(member.name)
                stem, _, field = name.name.partition(".")
                key = str(name.parent / stem)
                if not keys or keys[-1] != key:
                    keys.append(key)
                    found.append([])
                found[-1].append(_Member(field.lower(), member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); fetch the shard again") from error
    if not keys:
        raise ValueError(f"{path}: no files in it; a data set needs at least one record")
    return keys, [tuple(members) for members in found]


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _json(text: str | bytes, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError("json", f"{source}: not JSON ({error}); repair or remove it") from error


def _with_pictures(data: Mapping[str, Any], pictures: list[Any], root: str, source: str) -> Record:
    """The record of an object whose pictures came beside it: bytes, paths, or {"bytes", "path"} as stores have them."""
    names, contents = [], []
    for number, picture in enumerate(pictures):
        stored = picture.get("bytes") or picture.get("path") if isinstance(picture, Mapping) else picture
        if not isinstance(stored, str | bytes):
            said = f"picture {number} is empty; remove the row or give bytes or a path"
            raise RecordError("fields", f"{source}: {said}")
        names.append(f"picture-{number}")
        contents.append(stored if isinstance(stored, bytes) else str(Path(root) / stored))
    record = parse_record({**data, "image": names}, "", source)
    return Record(record.turns, tuple(contents), record.video, record.clip, record.source, record.id, record.ignored)
