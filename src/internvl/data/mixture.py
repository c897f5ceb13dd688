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
from functools import cached_property
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np
from jaxtyping import Int

from internvl.data.lines import Lines
from internvl.data.records import Record
from internvl.data.sources import JsonLines, Records, open_records


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

    def __post_init__(self) -> None:
        name = self.name or self.annotation
        if not 0 < self.repeat < math.inf:
            raise ValueError(f"{name}: repeat_time {self.repeat}; it must be above 0")
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
    try:
        meta = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); give a meta JSON or a file that ends in .jsonl, .parquet or .tar"
        ) from error
    if not isinstance(meta, dict) or not meta or not all(isinstance(entry, dict) for entry in meta.values()):
        raise ValueError(f"{path}: not a meta JSON; it maps names to objects with `root` and `annotation`")
    return [data for name, entry in meta.items() for data in _data_sets(name, entry, file.parent)]


def _data_sets(name: str, entry: Mapping[str, Any], folder: Path) -> list[DataSet]:
    """The set of an entry; of a pattern as `shards/*.tar`, one for each file."""
    annotation = entry.get("annotation")
    if not isinstance(annotation, str):
        raise ValueError(f"{name}: `annotation` is {annotation!r}; give the path of a JSONL, parquet or tar file")
    repeat = _number(entry, "repeat_time", name)
    data = DataSet(
        annotation=_find(annotation, folder),
        root=_find(str(entry.get("root", "")), folder),
        name=name,
        augment=bool(entry.get("data_augment", False)),
        max_tiles=_whole(entry, "max_dynamic_patch", name),
        repeat=1.0 if repeat is None else repeat,
        length=_whole(entry, "length", name),
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
