"""Which records an epoch has, and in which order: JSONL sets, their repeats, a seed (spec 5.1).

Lines are found by byte offset and parsed when needed; batches and workers are loader.py's.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from internvl.data.records import Record, parse_line

_WINDOW = 1 << 24
"""Bytes searched for line ends at a time."""


@dataclass(frozen=True)
class DataSet:
    """One JSONL file and how it is used: an entry of the official meta JSON."""

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

    def __post_init__(self) -> None:
        if not self.repeat > 0:
            raise ValueError(f"{self.name or self.annotation}: repeat_time {self.repeat}; it must be above 0")

    @cached_property
    def lines(self) -> Lines:
        return Lines(self.annotation)

    def record(self, position: int) -> Record:
        """The record at this place among the lines that are not blank."""
        return parse_line(self.lines.read(position), self.root, self.source(position))

    def source(self, position: int) -> str:
        return f"{self.annotation}:{self.lines.numbers[position]}"


class Lines:
    """Lines of a file by number, blank ones left out; holds offsets only."""

    def __init__(self, path: str) -> None:
        self.path = path
        ends = _line_ends(Path(path))
        self.starts, self.ends = np.concatenate([np.zeros(1, np.int64), ends[:-1]]), ends
        self.numbers = np.arange(1, len(ends) + 1)
        self._file: tuple[int, int] | None = None
        short = np.flatnonzero(self.ends - self.starts <= 2).tolist()
        blank = [position for position in short if not self.read(position).strip(b"\r\n")]
        kept = np.delete(np.arange(len(ends)), blank)
        self.starts, self.ends, self.numbers = self.starts[kept], self.ends[kept], self.numbers[kept]
        if not len(kept):
            raise ValueError(f"{path}: {len(ends)} blank lines and no record; a data set needs at least one")

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, position: int) -> bytes:
        if self._file is None or self._file[0] != os.getpid():  # a descriptor of the parent would be closed by it
            self._file = os.getpid(), os.open(self.path, os.O_RDONLY)
        start = int(self.starts[position])
        return os.pread(self._file[1], int(self.ends[position]) - start, start)


def _line_ends(path: Path) -> Int[np.ndarray, " lines"]:
    """Offset behind each line, the last one with or without its newline."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check `annotation` in the meta JSON")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path}: an empty file; a data set needs at least one record")
    found = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for start in range(0, size, _WINDOW):
            block = np.frombuffer(view[start : start + _WINDOW], np.uint8)
            found.append(np.flatnonzero(block == ord("\n")) + start + 1)
    ends = np.concatenate(found).astype(np.int64)
    return ends if len(ends) and ends[-1] == size else np.append(ends, size)


def read_sets(path: str | Path) -> list[DataSet]:
    """The sets of an official meta JSON, or the one set that a JSONL file is."""
    file = Path(path)
    if file.suffix == ".jsonl":
        return [DataSet(str(file), str(file.parent), file.stem)]
    try:
        meta = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give a meta JSON or a file that ends in .jsonl") from error
    if not isinstance(meta, dict) or not meta or not all(isinstance(entry, dict) for entry in meta.values()):
        raise ValueError(f"{path}: not a meta JSON; it maps names to objects with `root` and `annotation`")
    return [_data_set(name, entry, file.parent) for name, entry in meta.items()]


def _data_set(name: str, entry: Mapping[str, Any], folder: Path) -> DataSet:
    if not isinstance(entry.get("annotation"), str):
        raise ValueError(f"{name}: `annotation` is {entry.get('annotation')!r}; give the path of a JSONL file")
    return DataSet(
        annotation=_find(entry["annotation"], folder),
        root=_find(str(entry.get("root", "")), folder),
        name=name,
        augment=bool(entry.get("data_augment", False)),
        max_tiles=entry.get("max_dynamic_patch"),
        repeat=float(entry.get("repeat_time", 1)),
    )


def _find(path: str, folder: Path) -> str:
    """As given (official: from the working directory), else from the folder of the meta JSON."""
    return path if os.path.exists(path) or os.path.isabs(path) else str(folder / path)


class Mixture:
    """Sets one after the other, as numbered records; an epoch is a shuffled list of their numbers."""

    def __init__(self, sets: Sequence[DataSet], seed: int = 0, shuffle: bool = True) -> None:
        if not sets:
            raise ValueError("no data sets; name at least one in the meta JSON")
        self.sets, self.seed, self.shuffle = list(sets), seed, shuffle
        self.bounds = np.cumsum([0, *(len(data.lines) for data in self.sets)])

    def __len__(self) -> int:
        """Records, each counted once."""
        return int(self.bounds[-1])

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
            numbers = np.arange(first, last)
            whole, rest = divmod(data.repeat, 1)
            yield np.tile(numbers, int(whole))
            yield np.sort(rng.choice(numbers, round(rest * len(numbers)), replace=False))
