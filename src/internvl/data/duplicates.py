"""Records that come again: digests of lines and of questions about media, and which places share one."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from jaxtyping import UInt64

from internvl.data.records import Record


def digest_asked(record: Record) -> int:
    """Digest of the media and everything that is asked about them."""
    questions = [turn.text for turn in record.turns if turn.role == "user"]
    said = (
        [digest(image) if isinstance(image, bytes) else str(image) for image in record.images],
        record.video,
        record.clip,
        questions,
    )
    return digest(repr(said).encode("utf-8", "surrogatepass"))


def digest(content: bytes) -> int:
    """Never 0."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") or 1


def repeated(every: UInt64[np.ndarray, " records"]) -> Iterator[tuple[int, int]]:
    """Each place whose digest an earlier place has, and the first of these; 0 is no digest."""
    order = np.argsort(every, kind="stable")
    starts = np.flatnonzero(np.diff(every[order], prepend=every[order][:1] + np.uint64(1)) != 0)
    firsts = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    for number, first in sorted(zip(order.tolist(), firsts.tolist(), strict=True)):
        if number != first and every[number]:
            yield number, first
