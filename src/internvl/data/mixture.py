"""Which records an epoch has, and in which order: sets, their repeats, a seed (spec 5.1).

Records are found by place and parsed when needed (sources.py); batches and workers are loader.py's.
"""

from __future__ import annotations

import glob
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np
from jaxtyping import Int

from internvl.data.lines import Lines
from internvl.data.records import Record
from internvl.data.sources import JsonLines, Records, open_records

FIELDS = ("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length")
"""Of an entry of the official meta JSON (spec 5.1)."""
MOST_ENTRIES = 10**9
"""Records of an epoch: their order lies in memory, four bytes each."""


@dataclass(frozen=True)
class DataSet:
    """One file of records and how it is used: an entry of the official meta JSON."""

    annotation: str
    root: str = ""
    """Prefix of its media paths."""
    name: str = ""
    augment: bool = False
    """JPEG augmentation (`data_augment`)."""
    max_tiles: int | None = None
    """Instead of the model's own (`max_dynamic_patch`)."""
    repeat: float = 1.0
    """Times an epoch has each record; of a fraction, a random subset of that size, drawn anew each epoch."""
    length: int | None = None
    """Records that the file must have; nothing is checked where it is not given."""
    entry: str = ""
    """Of the meta JSON, where several files are one entry."""
    ignored: tuple[str, ...] = ()
    """Fields of its entry that nothing here reads."""

    def __post_init__(self) -> None:
        name = self.name or self.annotation
        if not 0 < self.repeat < math.inf:
            raise ValueError(f"{name}: repeat_time {self.repeat}; it must be above 0: to leave a set out, remove it")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"{name}: max_dynamic_patch {self.max_tiles}; it must be at least 1, or not given")

    @cached_property
    def records(self) -> Records:
        return open_records(self.annotation, self.root)

    @property
    def lines(self) -> Lines:
        """Of a JSONL file."""
        if not isinstance(self.records, JsonLines):
            raise ValueError(f"{self.annotation}: lines are those of a JSONL file; write the records as one")
        return self.records.lines

    def __len__(self) -> int:
        """Records, each counted once."""
        return len(self.records)

    def raw(self, position: int) -> bytes:
        """The line of a JSONL file as it stands there; nothing of other files."""
        return self.records.lines.read(position) if isinstance(self.records, JsonLines) else b""

    def record(self, position: int) -> Record:
        """The record at this place; of JSONL, among the lines that are not blank."""
        return self.records.record(position)

    def source(self, position: int) -> str:
        return self.records.source(position)

    def check_length(self) -> None:
        """ValueError where the file does not have the records that the meta JSON says."""
        if self.length is not None and self.length != len(self):
            raise ValueError(
                f"{self.name or self.annotation}: `length` is {self.length} but {self.annotation} has {len(self)} "
                "records; correct it, remove it, or look whether the file is whole"
            )


def read_sets(path: str | Path) -> list[DataSet]:
    """The sets of an official meta JSON, or the one set that a JSONL, parquet or tar file is."""
    file = Path(path)
    if file.suffix in (".jsonl", ".parquet", ".tar"):
        return [DataSet(str(file), str(file.parent), file.stem)]
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a meta JSON or a file of records")
    try:
        meta = json.loads(file.read_bytes(), object_pairs_hook=_unlike)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not JSON ({error}); give a meta JSON or a file that ends in .jsonl, .parquet or .tar"
        ) from error
    if isinstance(meta, list):
        raise ValueError(
            f"{path}: a JSON list is not a meta JSON; records stand one a line, in a file that ends in .jsonl"
        )
    if not isinstance(meta, dict) or not meta or not all(isinstance(entry, dict) for entry in meta.values()):
        raise ValueError(f"{path}: not a meta JSON; it maps names to objects with `root` and `annotation`")
    return [data for name, entry in meta.items() for data in _data_sets(name, entry, file.parent)]


def _unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ: of two that are the same, JSON would keep the last and lose a set."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for at, (name, _) in enumerate(pairs) if name in dict(pairs[:at]))
        raise ValueError(f"{twice!r} stands twice in one object; rename or remove one")
    return found


def _data_sets(name: str, entry: Mapping[str, Any], folder: Path) -> list[DataSet]:
    """The set of an entry; of a pattern as `shards/*.tar`, one for each file."""
    annotation = entry.get("annotation")
    if not isinstance(annotation, str):
        raise ValueError(f"{name}: `annotation` is {annotation!r}; give the path of a JSONL, parquet or tar file")
    root, augment = entry.get("root") or "", entry.get("data_augment") or False
    if not isinstance(root, str):
        raise ValueError(f"{name}: `root` is {brief(root)}; give the folder of its pictures")
    if not isinstance(augment, bool):
        raise ValueError(f"{name}: `data_augment` is {brief(augment)}; give true or false")
    repeat = _number(entry, "repeat_time", name)
    data = DataSet(
        annotation=_find(annotation, folder),
        root=_find(root, folder),
        name=name,
        augment=augment,
        max_tiles=_whole(entry, "max_dynamic_patch", name),
        repeat=1.0 if repeat is None else repeat,
        length=_whole(entry, "length", name),
        ignored=_ignored(entry, name),
    )
    if "*" not in annotation or os.path.exists(data.annotation):
        return [data]
    paths = sorted(glob.glob(annotation)) or sorted(glob.glob(str(folder / annotation)))
    if not paths:
        raise FileNotFoundError(f"{name}: no file is called {annotation}; check `annotation`")
    sets = [replace(data, annotation=path, name=f"{name}/{Path(path).name}", length=None, entry=name) for path in paths]
    total = sum(len(one) for one in sets)
    if data.length is not None and data.length != total:
        raise ValueError(f"{name}: `length` is {data.length} but {len(paths)} files have {total} records; correct it")
    return sets


def _ignored(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Fields that nothing reads; ValueError for one that is a known one misspelt."""
    unknown = sorted(set(entry) - set(FIELDS))
    for field in unknown:
        if near := get_close_matches(field, set(FIELDS) - set(entry), 1, 0.8):
            raise ValueError(f"{name}: no field is called {field!r}; is {near[0]!r} meant?")
    return tuple(unknown)


def by_square_root(sets: Sequence[DataSet]) -> list[DataSet]:
    """Sets repeated so that an epoch has as many records in all, but of each entry in proportion to the square root.

    Small sets come more often, large ones in part, drawn anew each epoch (official `use_data_resampling`, as meant).
    """
    sizes: dict[str, float] = {}
    for data in sets:
        name = data.entry or data.name
        sizes[name] = sizes.get(name, 0.0) + data.repeat * len(data)
    total = sum(sizes.values()) / sum(math.sqrt(size) for size in sizes.values())
    return [replace(data, repeat=data.repeat * total / math.sqrt(sizes[data.entry or data.name])) for data in sets]


def _number(entry: Mapping[str, Any], field: str, name: str) -> float | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: `{field}` is {brief(value)}; give a number")
    return float(value)


def _whole(entry: Mapping[str, Any], field: str, name: str) -> int | None:
    value = _number(entry, field, name)
    if value is not None and not value.is_integer():
        raise ValueError(f"{name}: `{field}` is {entry[field]!r}; give a whole number")
    return None if value is None else int(value)


def _find(path: str, folder: Path) -> str:
    """As given (official: from the working directory), else from the folder of the meta JSON."""
    return path if os.path.exists(path) or os.path.isabs(path) else str(folder / path)


class Mixture:
    """Sets one after the other, as numbered records; an epoch is a shuffled list of their numbers."""

    def __init__(self, sets: Sequence[DataSet], seed: int = 0, shuffle: bool = True) -> None:
        if not sets:
            raise ValueError("no data sets; name at least one in the meta JSON")
        self.sets, self.seed, self.shuffle = list(sets), seed, shuffle
        for data in self.sets:
            data.check_length()
        self.bounds = np.cumsum([0, *(len(data) for data in self.sets)])
        self._check_entries()

    def _check_entries(self) -> None:
        """ValueError where an epoch is too long, or has no record of a set."""
        for data in self.sets:
            if self.entries and not int(data.repeat) and not round(data.repeat * len(data)):
                raise ValueError(
                    f"{data.name or data.annotation}: repeat_time {data.repeat:g} of {len(data)} records is none in an "
                    "epoch; raise it, or leave the set out"
                )
        if self.entries > MOST_ENTRIES:
            most = max(self.sets, key=lambda data: data.repeat * len(data))
            raise ValueError(
                f"an epoch of {self.entries:,} records; the limit is {MOST_ENTRIES:,}; lower repeat_time of "
                f"{most.name or most.annotation}, which is {most.repeat:g}"
            )

    def __len__(self) -> int:
        """Records, each counted once."""
        return int(self.bounds[-1])

    @property
    def entries(self) -> int:
        """Records of an epoch, each as often as it comes."""
        sizes = np.diff(self.bounds).tolist()
        return sum(
            int(data.repeat) * size + round(data.repeat % 1 * size) for data, size in zip(self.sets, sizes, strict=True)
        )

    def locate(self, number: int) -> tuple[int, int]:
        """Set and place in it of a record."""
        index = int(np.searchsorted(self.bounds, number, "right")) - 1
        return index, number - int(self.bounds[index])

    def source(self, number: int) -> str:
        """File and line of a record."""
        index, position = self.locate(number)
        return self.sets[index].source(position)

    def epoch(self, epoch: int) -> Int[np.ndarray, " entries"]:
        """Numbers of the records of an epoch, in its order."""
        rng = np.random.default_rng([self.seed, epoch])
        numbers = np.concatenate(list(self._repeated(rng)))
        if not len(numbers):
            raise ValueError(f"{len(self)} records, none of them in an epoch; raise repeat_time of a set")
        if self.shuffle:
            rng.shuffle(numbers)
        return numbers

    def _repeated(self, rng: np.random.Generator) -> Iterator[Int[np.ndarray, " entries"]]:
        for data, first, last in zip(self.sets, self.bounds[:-1], self.bounds[1:], strict=True):
            numbers = np.arange(first, last, dtype=np.int32 if self.bounds[-1] < 2**31 else np.int64)
            whole, rest = divmod(data.repeat, 1)
            yield np.tile(numbers, int(whole))
            yield np.sort(rng.choice(numbers, round(rest * len(numbers)), replace=False))
