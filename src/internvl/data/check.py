"""`internvl data check`: every record of every set as training would meet it, before training.

Errors of a record are those of records.py, encode.py and media; this adds what only shows beside other records, and
what the files declare about themselves. Printing is report.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt64
from torch.utils.data import DataLoader, Dataset

from internvl.data.duplicates import digest, digest_asked, repeated
from internvl.data.encode import Encoder
from internvl.data.findings import MOST_FINDINGS, Finding, Report, SetReport
from internvl.data.images import header_size
from internvl.data.loader import encoder_of
from internvl.data.measure import unchanged
from internvl.data.mixture import DataSet
from internvl.data.records import Record, load_line, parse_record, place_of, printable, reason_of
from internvl.data.repetition import Bounds
from internvl.data.sample import Outline

_CHUNK = 256


@dataclass(frozen=True)
class Checks:
    """What is looked at, beyond what training would refuse."""

    decode: bool = False
    """Read pixels and frames, too; otherwise headers."""
    bounds: Bounds = field(default_factory=Bounds)
    workers: int = 0


class _Part(NamedTuple):
    """What a worker found in a chunk of records."""

    findings: list[tuple[int, str, str]]
    """Position, reason, message."""
    kinds: list[str]
    """Of the accepted records."""
    sizes: Int[np.ndarray, "measured 3"]
    """Tokens before cutting, tiles, learned tokens of every record whose text and headers could be read."""
    digests: UInt64[np.ndarray, "records 2"]
    """Of the line; of media and questions, 0 where they could not be read."""
    ignored: list[str]
    """Fields that nothing reads, once for each record that has them."""


@dataclass
class _Chunks(Dataset[_Part]):
    data: DataSet
    encoder: Encoder
    checks: Checks

    def __len__(self) -> int:
        return -(-len(self.data) // _CHUNK)

    def __getitem__(self, chunk: int) -> _Part:
        if chunk >= len(self):
            raise IndexError(chunk)
        part = _Part([], [], np.zeros((0, 3), np.int32), np.zeros((0, 2), np.uint64), [])
        sizes: list[tuple[int, int, int]] = []
        digests: list[tuple[int, int]] = []
        for position in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.data))):
            line = self.data.raw(position).strip()
            digests.append((digest(line) if line else 0, 0))
            try:
                record, outline = self._look(position, line, part, sizes)
                digests[-1] = (digests[-1][0], digest_asked(record))
                self._fits(record, outline)
            except (ValueError, OSError) as error:
                part.findings.append((position, reason_of(error), printable(error)))
            else:
                part.kinds.append(record.kind)
                if self.encoder.max_length is not None and outline.tokens > self.encoder.max_length:
                    part.findings.append((position, "cut", f"{outline.tokens} tokens; {self.encoder.max_length} stay"))
        return part._replace(
            sizes=np.asarray(sizes, np.int32).reshape(-1, 3), digests=np.asarray(digests, np.uint64).reshape(-1, 2)
        )

    @cached_property
    def _whole(self) -> Encoder:
        """Measures records that are too long as well."""
        return replace(self.encoder, max_length=None)

    def _look(
        self, position: int, line: bytes, part: _Part, sizes: list[tuple[int, int, int]]
    ) -> tuple[Record, Outline]:
        data: dict[str, Any] = {}
        if line:
            data = load_line(line, self.data.source(position))
            record = parse_record(data, self.data.root, self.data.source(position))
        else:  # no line in a file of another kind
            record = self.data.record(position)
        part.ignored.extend(record.ignored)
        outline = self._whole.outline(record)
        sizes.append((outline.tokens, outline.tiles, outline.learned))
        found = [
            ("repeats", complaint) for complaint in map(self.checks.bounds.complaint, _answers(record)) if complaint
        ]
        for reason, said in (*found[:1], *_declared(data, record, outline)):
            part.findings.append((position, reason, printable(said)))
        if self.checks.decode:
            sample = self._whole.encode(record)
            if (len(sample.input_ids), sample.num_tiles) != (outline.tokens, outline.tiles):
                said = f"headers promise {outline.tiles} tiles, the pixels make {sample.num_tiles}"
                part.findings.append((position, "header", said))
        return record, outline

    def _fits(self, record: Record, outline: Outline) -> None:
        """Refuse what training would refuse for its length."""
        if self.encoder.max_length is not None and outline.tokens > self.encoder.max_length:
            self.encoder.outline(record)


def _answers(record: Record) -> list[str]:
    return [turn.text for turn in record.turns if turn.role == "assistant"]


def _declared(data: dict[str, Any], record: Record, outline: Outline) -> Iterator[tuple[str, str]]:
    """What a record says about itself and is not so."""
    length = data.get("length")
    if isinstance(length, int) and length != outline.tokens:
        yield "declared_tokens", f"length {length}, but {outline.tokens} tokens"
    widths = data.get("width_list", data.get("width"))
    heights = data.get("height_list", data.get("height"))
    widths, heights = (value if isinstance(value, list) else [value] for value in (widths, heights))
    if (widths, heights) == ([None], [None]):
        return
    if len(widths) != len(record.images) or len(heights) != len(record.images):
        yield "declared_size", f"{len(widths)} widths and {len(heights)} heights, but {len(record.images)} images"
        return
    for source, *said in zip(record.images, widths, heights, strict=True):
        real = list(header_size(source))
        if said not in (real, real[::-1]):  # lying or upright: the EXIF turn is not always counted
            yield "declared_size", f"{said[0]} x {said[1]}, but the picture has {real[0]} x {real[1]} px"


def check(
    sets: Sequence[DataSet],
    encoder: Encoder,
    checks: Checks | None = None,
    on_progress: Callable[[int], None] = lambda records: None,
) -> Report:
    """Look at every record; the same report for any number of workers."""
    checks = checks or Checks()
    report = Report([])
    found: list[list[tuple[int, str, str]]] = []
    digests: list[UInt64[np.ndarray, "records 2"]] = []
    for data in sets:
        said, made, marks = _one(data, encoder_of(encoder, data), checks, on_progress)
        report.sets.append(made)
        found.append(said)
        digests.append(marks)
    _find_again(sets, digests, found)
    for data, made, said in zip(sets, report.sets, found, strict=True):
        made.reasons.update(reason for _, reason, _ in said)
        for position, reason, message in sorted(said, key=lambda some: some[0]):
            if len(report.findings) >= MOST_FINDINGS:
                report.left_off += 1
                continue
            place = 0 if position < 0 else place_of(data.source(position))[1]
            report.findings.append(Finding(made.name, data.annotation, place, reason, message))
    return report


def _one(
    data: DataSet, encoder: Encoder, checks: Checks, on_progress: Callable[[int], None]
) -> tuple[list[tuple[int, str, str]], SetReport, UInt64[np.ndarray, "records 2"]]:
    """Everything that shows inside one set."""
    made = SetReport(data.name or data.annotation, data.annotation, encoder.max_length, meta_ignored=data.ignored)
    none = np.zeros((0, 2), np.uint64)
    try:
        made.given = len(data)
    except (ValueError, OSError) as error:
        return [(-1, reason_of(error), printable(error))], made, none
    said: list[tuple[int, str, str]] = []
    if data.length is not None and data.length != made.given:
        message = f"the meta JSON says {data.length} records (`length`), the file has {made.given}"
        said.append((-1, "declared_length", message))
    parts: list[_Part] = []
    for part in _run(_Chunks(data, encoder, checks), checks.workers):
        said += part.findings
        made.kinds.update(part.kinds)
        made.ignored.update(part.ignored)
        parts.append(part)
        on_progress(len(part.digests))
    made.sizes = np.concatenate([made.sizes, *(part.sizes for part in parts)])
    return said, made, np.concatenate([none, *(part.digests for part in parts)])


def _run(chunks: _Chunks, workers: int) -> Iterator[_Part]:
    if not workers:
        return (chunks[number] for number in range(len(chunks)))
    return iter(
        DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=unchanged, multiprocessing_context="fork")
    )


def _find_again(
    sets: Sequence[DataSet],
    digests: Sequence[UInt64[np.ndarray, "_ 2"]],  # each set has its own number of records
    found: list[list[tuple[int, str, str]]],
) -> None:
    """Add each record whose line, or whose media and questions, an earlier one has, in the same set or one before."""
    bounds = np.cumsum([0, *map(len, digests)])
    every = np.concatenate(digests)
    lines = dict(repeated(every[:, 0]))
    asked = {number: first for number, first in repeated(every[:, 1]) if number not in lines}
    for reason, pairs in (("same_line", lines), ("same_question", asked)):
        for number, first in pairs.items():
            index, position = _place(bounds, number)
            at = _place(bounds, first)
            found[index].append((position, reason, f"as {sets[at[0]].source(at[1])}"))


def _place(bounds: np.ndarray, number: int) -> tuple[int, int]:
    index = int(np.searchsorted(bounds, number, "right")) - 1
    return index, number - int(bounds[index])
