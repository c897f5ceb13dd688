"""Sets -> sets of what is good enough, and files of what is not: kept + rejected = given, line for line.

What is good enough, filters.py says. Kept lines are the bytes of the original ones.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from internvl.curate.filters import Rules, Score, Verdict
from internvl.curate.judge import Judge
from internvl.data.duplicates import digest, digest_asked, repeated
from internvl.data.ledger import entry_of
from internvl.data.measure import unchanged
from internvl.data.mixture import DataSet
from internvl.data.records import RecordError, load_line, parse_record, printable

_CHUNK = 256
_ASKED = 64
"""Records that a model scores at a time."""


class _Part(NamedTuple):
    verdicts: dict[int, Verdict]
    """Position -> why it goes."""
    missing: dict[int, tuple[Score, ...]]
    """Position -> scores that nobody gave, of records that may stay."""
    digests: list[int]
    """0 of those that go."""


@dataclass
class _Look(Dataset[_Part]):
    """What a worker holds: numbers of chunks in, verdicts out."""

    data: DataSet
    rules: Rules

    def __len__(self) -> int:
        return -(-len(self.data.lines) // _CHUNK)

    def __getitem__(self, chunk: int) -> _Part:
        if chunk >= len(self):
            raise IndexError(chunk)
        part = _Part({}, {}, [])
        name = self.data.entry if self.data.entry in self.rules.exempt else name_of(self.data)
        for position in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.data.lines))):
            line, source = self.data.lines.read(position).strip(), self.data.source(position)
            part.digests.append(0)
            try:
                loaded = load_line(line, source)
                record = parse_record(loaded, self.data.root, source)
            except RecordError as error:
                part.verdicts[position] = Verdict(error.reason, printable(error))
                continue
            verdict, missing = self.rules.look(loaded, record, name)
            if verdict is not None:
                part.verdicts[position] = verdict._replace(message=printable(verdict.message))
                continue
            part.digests[-1] = digest(line) if self.rules.duplicates == "line" else digest_asked(record)
            if missing:
                part.missing[position] = missing
        return part


@dataclass
class Filtered:
    """What became of one set."""

    name: str
    given: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    unscored: int = 0
    """Kept without a score that a model was asked for, or that stands in no field."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "rejected": dict(sorted(self.rejected.items()))}


def name_of(data: DataSet) -> str:
    return data.name or Path(data.annotation).stem


def filter_sets(
    sets: Sequence[DataSet],
    out: Path,
    rules: Rules,
    judge: Judge | None = None,
    workers: int = 0,
    on_progress: Callable[[int], None] = lambda records: None,
) -> list[Filtered]:
    """NAME.kept.jsonl, NAME.rejected.jsonl, meta.json and counts.json below `out`."""
    if (out / "counts.json").exists():
        raise ValueError(f"{out / 'counts.json'} exists; give a folder that is new, so that nothing is mixed up")
    names = dict.fromkeys(data.entry or name_of(data) for data in sets)
    if unknown := sorted(set(rules.exempt) - {*names, *map(name_of, sets)}):
        raise ValueError(f"rules.exempt names {unknown[0]!r}, which is no set; there are {', '.join(names)}")
    verdicts: list[dict[int, Verdict]] = []
    digests: list[np.ndarray] = []
    unscored: list[set[int]] = []
    for data in sets:
        found = list(_run(data, rules, workers, on_progress))
        verdicts.append({place: why for part in found for place, why in part.verdicts.items()})
        digests.append(np.asarray([mark for part in found for mark in part.digests], np.uint64))
        missing = {place: scores for part in found for place, scores in part.missing.items()}
        unscored.append(_score(data, rules, judge, missing, verdicts[-1]))
        digests[-1][list(verdicts[-1])] = 0
    if rules.duplicates != "none":
        _drop_again(sets, rules, digests, verdicts)
    out.mkdir(parents=True, exist_ok=True)
    reports = []
    for data, file, why, bare in zip(sets, _file_names(sets), verdicts, unscored, strict=True):
        given = len(data.lines)
        _write(data, out / f"{file}.kept.jsonl", out / f"{file}.rejected.jsonl", why)
        rejected = Counter(verdict.reason for verdict in why.values())
        reports.append(Filtered(name_of(data), given, given - len(why), rejected, len(bare - why.keys())))
    _write_json(out / "counts.json", {some.name: some.to_json() for some in reports})
    _write_meta(sets, reports, out)
    return reports


def _run(data: DataSet, rules: Rules, workers: int, on_progress: Callable[[int], None]) -> Iterator[_Part]:
    look = _Look(data, rules)
    chunks: Any = (look[number] for number in range(len(look)))
    if workers:
        chunks = DataLoader(
            look, batch_size=None, num_workers=workers, collate_fn=unchanged, multiprocessing_context="fork"
        )
    for part in chunks:
        on_progress(len(part.digests))
        yield part


def _score(
    data: DataSet,
    rules: Rules,
    judge: Judge | None,
    missing: dict[int, tuple[Score, ...]],
    verdicts: dict[int, Verdict],
) -> set[int]:
    """Ask for the scores that nobody gave; positions that stay without one."""
    named = {"quality": rules.quality_field, "repetition": rules.repetition_field}
    if judge is None:
        return {place for place, scores in missing.items() if any(named[score] for score in scores)}
    without: set[int] = set()
    asked = ((place, score) for place, scores in missing.items() for score in scores)
    while some := list(islice(asked, _ASKED)):
        values = judge.scores([(data.record(place), score) for place, score in some])
        for (place, score), value in zip(some, values, strict=True):
            verdict = None if value is None else rules.judge(score, value)
            if value is None:
                without.add(place)
            elif verdict is not None:
                verdicts.setdefault(place, verdict)
    return without


def _drop_again(
    sets: Sequence[DataSet], rules: Rules, digests: Sequence[np.ndarray], verdicts: Sequence[dict[int, Verdict]]
) -> None:
    bounds = np.cumsum([0, *map(len, digests)])
    reason = f"same_{rules.duplicates}"
    for number, first in repeated(np.concatenate(digests)):
        index, before = (int(np.searchsorted(bounds, place, "right")) - 1 for place in (number, first))
        said = f"as {sets[before].source(first - int(bounds[before]))}"
        verdicts[index][number - int(bounds[index])] = Verdict(reason, said)


def _file_names(sets: Sequence[DataSet]) -> list[str]:
    """A name of a set may be anything; a file's is letters, digits and dashes, and its own."""
    names: list[str] = []
    for data in sets:
        plain = re.sub(r"[^\w-]+", "_", name_of(data)) or "set"
        names.append(plain if plain not in names else f"{plain}_{len(names)}")
    return names


def _write(data: DataSet, kept: Path, rejected: Path, verdicts: dict[int, Verdict]) -> None:
    """Both files appear only when they are whole."""
    drafts = [path.with_name(f".{path.name}.partial") for path in (kept, rejected)]
    with open(drafts[0], "wb") as good, open(drafts[1], "w", encoding="utf-8") as bad:
        for position in range(len(data.lines)):
            line = data.lines.read(position).rstrip(b"\r\n")
            if position not in verdicts:
                good.write(line + b"\n")
                continue
            verdict = verdicts[position]
            entry = entry_of(name_of(data), data.source(position), verdict.reason, verdict.message, line)
            bad.write(json.dumps(entry) + "\n")
    for draft, path in zip(drafts, (kept, rejected), strict=True):
        os.replace(draft, path)


def _write_meta(sets: Sequence[DataSet], reports: Sequence[Filtered], out: Path) -> None:
    """The official meta JSON of what was kept; paths are absolute, since other tools look them up from anywhere."""
    meta = {}
    for data, file, report in zip(sets, _file_names(sets), reports, strict=True):
        if not report.kept:  # an empty file is no data set
            continue
        meta[report.name] = {
            "root": os.path.abspath(data.root),
            "annotation": os.path.abspath(out / f"{file}.kept.jsonl"),
            "data_augment": data.augment,
            **({} if data.max_tiles is None else {"max_dynamic_patch": data.max_tiles}),
            "repeat_time": data.repeat,
            "length": report.kept,
        }
    if meta:
        _write_json(out / "meta.json", meta)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
