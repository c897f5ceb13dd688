"""Tokens and tiles of every record of a set, from text and image headers; kept on disk, so that it is done once."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from internvl.data.encode import Encoder
from internvl.data.mixture import DataSet
from internvl.fetch import cache_folder

T = TypeVar("T")

_CHUNK = 256
"""Records that a worker measures at a time."""


@dataclass
class _Chunks(Dataset[Int[np.ndarray, "records 2"]]):
    data: DataSet
    encoder: Encoder

    def __len__(self) -> int:
        return -(-len(self.data) // _CHUNK)

    def __getitem__(self, chunk: int) -> Int[np.ndarray, "records 2"]:
        if chunk >= len(self):
            raise IndexError(chunk)
        last = min((chunk + 1) * _CHUNK, len(self.data))
        return np.asarray([self._count(position) for position in range(chunk * _CHUNK, last)], np.int32)

    def _count(self, position: int) -> tuple[int, int]:
        """Nothing for a record that cannot be used: making its sample will say why."""
        try:
            return self.encoder.counts(self.data.record(position))
        except (ValueError, OSError):
            return 0, 0


def measure(data: DataSet, encoder: Encoder, workers: int = 0) -> Int[np.ndarray, "records 2"]:
    """Tokens and tiles of each record, in the order of the file."""
    kept = _path(data, encoder)
    if kept.is_file():
        found: np.ndarray = np.load(kept, mmap_mode="r", allow_pickle=False)
        return found
    chunks = _Chunks(data, encoder)
    if workers:
        context = "fork"
        loader = DataLoader(
            chunks, batch_size=None, num_workers=workers, collate_fn=unchanged, multiprocessing_context=context
        )
        parts = list(started(loader))
    else:
        parts = [chunks[number] for number in range(len(chunks))]
    counts = np.concatenate(parts)
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_name(f"{kept.stem}.{os.getpid()}.npy")
    np.save(draft, counts, allow_pickle=False)
    os.replace(draft, kept)
    return counts


def _path(data: DataSet, encoder: Encoder) -> Path:
    """Named by the file, its date and every setting that sizes follow from."""
    status = os.stat(data.annotation)
    said = (
        (os.path.abspath(data.annotation), data.root, status.st_size, status.st_mtime_ns),
        (encoder.config, encoder.max_length, encoder.frames, encoder.tokeniser.fingerprint),
    )
    return cache_folder() / "counts" / f"{hashlib.sha256(repr(said).encode()).hexdigest()[:32]}.npy"


def unchanged(item: Any) -> Any:
    """What a worker made, as it is: the default would turn its arrays and tuples into others."""
    return item


def started(loader: DataLoader[T]) -> Iterator[T]:
    """What a loader's workers make, who begin here.

    A full collection of garbage in a worker would write to every object that it inherits, and so copy all of them:
    84 MB a worker with torch and transformers loaded. Frozen ones are passed over.
    """
    gc.freeze()
    try:
        return iter(loader)  # forks here
    finally:
        gc.unfreeze()
