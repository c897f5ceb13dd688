"""Samples out of webdataset tars and parquet files, read from front to back; damage is told by file and member.

Members are bytes here; opening pictures is images.py's.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from internvl.data.labelled import report
from internvl.data.records import Problem

MAX_MEMBER_BYTES = 1 << 28
"""256 MiB: a header may claim any size."""
PICTURE_FIELDS = ("jpg", "jpeg", "png", "webp")
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, UnicodeError, ValueError, OverflowError)
"""What tarfile and gzip raise on broken bytes."""


@dataclass(frozen=True)
class ShardSample:
    """Members of one name, by what follows its first dot: {"jpg": ..., "txt": ...}."""

    key: str
    fields: Mapping[str, bytes]
    source: str
    """Shard and first member, for messages."""


def read_tar(path: str | Path, problems: list[Problem] | None = None) -> Iterator[ShardSample]:
    """Samples of a webdataset tar (.tar, .tar.gz): neighbouring members whose names agree up to the first dot.

    A truncated or damaged shard is a ValueError with shard and member; with `problems` it is listed there and the shard
    ends: samples whose members all came whole are given, the one that was cut off is not. A shard must end with the
    two empty blocks of the format, else its last sample may be incomplete and it counts as truncated. A member name
    that stands twice in a sample is a problem too; the sample is left out.
    """
    members: dict[str, bytes] = {}
    key, source, spoiled = "", "", False
    for member in _members(Path(path), problems):
        if member is None:
            if members and not spoiled:
                yield ShardSample(key, members, source)
            return
        name, content = member
        stem, field = _split(name)
        if stem != key:
            if members and not spoiled:
                yield ShardSample(key, members, source)
            key, source, members, spoiled = stem, f"{path}:{name}", {}, False
        if field in members:
            report(f"{path}:{name}", "the member stands twice; pack the shard again", problems)
            spoiled = True
        members[field] = content


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, field = path.name.partition(".")
    return str(path.parent / stem), field.lower()


def _members(path: Path, problems: list[Problem] | None) -> Iterator[tuple[str, bytes] | None]:
    """Name and bytes of each file; then None where the shard ended as it should."""
    last = "start of the shard"
    try:
        with _open(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            while True:
                member = shard.next()
                if member is None:
                    _check_end(file, shard)
                    break
                last = member.name
                if not member.isfile():
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"a member of {member.size} bytes; the limit is {MAX_MEMBER_BYTES}; split it")
                content = shard.extractfile(member)
                assert content is not None
                yield member.name, content.read()
        yield None
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        report(f"{path}: at or after {last}", f"truncated or damaged ({error}); fetch the shard again", problems)


def _open(path: Path) -> io.BufferedIOBase:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


def _check_end(file: io.BufferedIOBase, shard: tarfile.TarFile) -> None:
    """tarfile takes a missing end, and half a header, for the end: all is well if it read one whole empty block."""
    if file.tell() - shard.offset != tarfile.BLOCKSIZE:
        raise tarfile.ReadError("the end marker is missing")


def picture_and_text(
    sample: ShardSample, text_field: str = "txt", picture_fields: Sequence[str] = PICTURE_FIELDS
) -> tuple[bytes, str]:
    """The picture's bytes and the text of a sample; ValueError, with shard and member, where one is missing."""
    found = [field for field in picture_fields if field in sample.fields]
    if len(found) != 1 or text_field not in sample.fields:
        raise ValueError(
            f"{sample.source}: fields {', '.join(sorted(sample.fields))}; a pair has one of "
            f"{', '.join(picture_fields)} and {text_field}"
        )
    try:
        return sample.fields[found[0]], sample.fields[text_field].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{sample.source}: its {text_field} is not UTF-8: {error}; pack the shard again") from error


def read_parquet(
    path: str | Path,
    columns: Sequence[str],
    *,
    rows_at_once: int = 256,
    problems: list[Problem] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, these columns; {"bytes": ..., "path": ...}, as pictures are stored, is bytes.

    Needs `pip install 'internvl[parquet]'`. ValueError with file (and row) for damage and for a column that is not
    there; rows with an empty value are problems.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError("parquet files need: pip install 'internvl[parquet]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            absent = [name for name in columns if name not in file.schema_arrow.names]
            if absent:
                raise ValueError(f"{path}: no column {absent[0]!r}; there are {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=rows_at_once, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    values = {name: _stored(row[name]) for name in columns}
                    missing = [name for name, value in values.items() if value is None]
                    if missing:
                        report(f"{path}: row {number}", f"{missing[0]!r} is empty; remove the row", problems)
                        continue
                    yield values
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        report(f"{path}: after row {number}", f"damaged ({error}); fetch the file again", problems)


def _stored(value: Any) -> Any:
    return value["bytes"] if isinstance(value, dict) and "bytes" in value else value


def write_tar(path: str | Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> None:
    """A webdataset tar of (key, fields); the same samples give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for key, fields in samples:
            for field, content in fields.items():
                header = tarfile.TarInfo(f"{key}.{field}")
                header.size = len(content)
                shard.addfile(header, io.BytesIO(content))
