"""Pictures that are the same, or nearly: by their bytes, and by a small look that survives scaling and compression."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int
from PIL import Image

BITS = 64
COLOUR_SIDE = 4
MOST_COLOUR = 24
"""Levels, of 255, by which a coarse cell of a near picture may differ: plain pictures have no edges to compare."""


@dataclass(frozen=True)
class Look:
    """What a picture looks like, in 112 bytes."""

    edges: int
    """64 bits: is a cell of a 9 x 8 grey picture brighter than its left neighbour (a difference hash)."""
    colours: Int[np.ndarray, " levels"]
    """A 4 x 4 picture in colour."""

    def near(self, other: Look, bits: int) -> bool:
        if (self.edges ^ other.edges).bit_count() > bits:
            return False
        return int(np.abs(self.colours - other.colours).max()) <= MOST_COLOUR


def look(image: Image.Image) -> Look:
    """The look of an RGB picture."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits((grey[:, 1:] > grey[:, :-1]).ravel())
    small = image.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    return Look(int.from_bytes(bits.tobytes(), "big"), np.asarray(small).astype(np.int16).ravel())


class Looks:
    """Looks seen so far, found again within `bits` differing bits.

    The 64 bits are cut into `bits` + 1 parts: two looks that differ in at most `bits` places agree in one part whole.
    """

    def __init__(self, bits: int) -> None:
        if not 0 <= bits < BITS:
            raise ValueError(f"near is {bits} bits; it must be from 0 to {BITS - 1}")
        self.bits = bits
        edges = [round(part * BITS / (bits + 1)) for part in range(bits + 2)]
        self._parts = list(pairwise(edges))
        self._seen: dict[tuple[int, int], list[tuple[Look, str]]] = {}

    def find(self, wanted: Look) -> str | None:
        """Name of a picture that looks so, if any."""
        for key in self._keys(wanted):
            for other, name in self._seen.get(key, ()):
                if wanted.near(other, self.bits):
                    return name
        return None

    def add(self, seen: Look, name: str) -> None:
        for key in self._keys(seen):
            self._seen.setdefault(key, []).append((seen, name))

    def _keys(self, seen: Look) -> list[tuple[int, int]]:
        return [
            (part, (seen.edges >> first) & ((1 << (last - first)) - 1))
            for part, (first, last) in enumerate(self._parts)
        ]
