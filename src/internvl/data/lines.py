"""Lines of a JSONL file by number: an index of offsets on disk, mapped into memory, shared by ranks and workers.

The file itself is read line by line where a record is needed; what a line says is records.py's.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from internvl.fetch import cache_folder, locked

_WINDOW = 1 << 24
"""Bytes searched for line ends at a time."""


class Lines:
    """Lines of a file, blank ones left out; holds offsets only, and those on disk."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._index: Int[np.ndarray, "lines 2"] | None = None
        self._file: tuple[int, int] | None = None
        kept = _index_path(path)
        with locked(kept):  # ranks that start together: one makes it
            if not (kept.is_file() and _digest_path(kept).is_file()):
                _write_index(path, kept)
        self._kept = kept
        self._length = len(self.index) - 1

    @property
    def index(self) -> Int[np.ndarray, "lines 2"]:
        """Where each line begins and its number from 1; the last entry is the end of the file."""
        if self._index is None:
            self._index = np.load(self._kept, mmap_mode="r", allow_pickle=False)
        return self._index

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_index": None}  # a copied index would be in memory

    def digest(self) -> str:
        """Of the whole file, whatever it is called and however old."""
        return _digest_path(self._kept).read_text(encoding="ascii")

    @property
    def numbers(self) -> Int[np.ndarray, " lines"]:
        """Of each line in the file, from 1; a view of the index."""
        return self.index[:-1, 1]

    def read(self, position: int) -> bytes:
        """The line, with what ends it; blank lines behind it may follow."""
        if self._file is None or self._file[0] != os.getpid():  # a descriptor of the parent would be closed by it
            self._file = os.getpid(), os.open(self.path, os.O_RDONLY)
        start, end = map(int, self.index[position : position + 2, 0])
        return os.pread(self._file[1], end - start, start)


def _index_path(path: str) -> Path:
    """Named by the file, its size and its date: another content has another index."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; check `annotation` in the meta JSON")
    status = os.stat(path)
    if not status.st_size:
        raise ValueError(f"{path}: an empty file; a data set needs at least one record")
    said = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
    return cache_folder() / "lines" / f"{hashlib.sha256(repr(said).encode()).hexdigest()[:32]}.npy"


def _write_index(path: str, kept: Path) -> None:
    """Windows of the file to one array, in memory only as long as it is made."""
    parts = list(_starts(path))
    found = np.concatenate(parts)
    if not len(found):
        raise ValueError(f"{path}: {_count_blank(path)} blank lines and no record; a data set needs at least one")
    index = np.concatenate([found, [[os.path.getsize(path), 0]]])
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_WINDOW):
            digest.update(block)
    draft = kept.with_name(f"{kept.stem}.{os.getpid()}.npy")
    draft.write_text(digest.hexdigest(), encoding="ascii")
    os.replace(draft, _digest_path(kept))
    np.save(draft, index, allow_pickle=False)
    os.replace(draft, kept)


def _digest_path(kept: Path) -> Path:
    return kept.with_suffix(".digest")


def _starts(path: str) -> Iterator[Int[np.ndarray, "lines 2"]]:
    """Begin and number of the lines that are not blank, window by window."""
    size, begin, number = os.path.getsize(path), 0, 1
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for first in range(0, size, _WINDOW):
            block = np.frombuffer(view[first : first + _WINDOW], np.uint8)
            ends = np.flatnonzero(block == ord("\n")) + first + 1
            if first + len(block) == size and (not len(ends) or ends[-1] != size):
                ends = np.append(ends, size)
            if not len(ends):
                continue
            begins = np.concatenate([[begin], ends[:-1]])
            short = np.flatnonzero(ends - begins <= 2)
            blank = [at for at in short.tolist() if not view[int(begins[at]) : int(ends[at])].strip(b"\r\n")]
            lines = np.stack([begins, np.arange(number, number + len(ends))], 1).astype(np.int64)
            yield np.delete(lines, blank, 0)
            begin, number = int(ends[-1]), number + len(ends)


def _count_blank(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
