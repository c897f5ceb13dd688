"""The collected folder as a library: pictures by side of the split, cut-outs by what they show, decoded once.

Making scenes of them is `scenes.py`; the folder comes from `collect.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from internvl.data.packaged.common import set_of

Split = Literal["train", "heldout", "fresh", "kinds"]
"""The last two are those of `drawings.py`: never learned by the ViT, and learned."""
CUTOUT_PX, BACKGROUND_PX = 192, 512
ADDED: dict[Split, str] = {"fresh": "drawings.jsonl", "kinds": "kinds.jsonl"}
"""Files of what stands beside the collected pictures."""
_GENERAL = set_of("creature animal person thing object food plant body tool figure")
"""Never asked for in vain: most pictures show one."""
_MANY = ("ss", "us", "is", "os")
"""Endings in s of singular nouns."""


@dataclass(frozen=True)
class Entry:
    """One collected picture; fields as in pictures.jsonl."""

    id: str
    file: str
    source: str
    kind: str
    title: str
    name: str
    head: str
    accept: tuple[str, ...]
    wider: frozenset[str]
    group_kind: str
    names: dict[str, str]
    captions: tuple[str, ...]
    keywords: tuple[str, ...]
    category: str
    cutout: bool
    background: bool
    colour: str | None
    fill: float
    parts: int
    proper: bool
    split: Split
    name_seen: bool
    width: int
    height: int
    path: str
    """Inside the package."""
    group: str
    """Smallest id of the pictures that look like this one."""

    @property
    def single(self) -> bool:
        """Shows one thing, as far as its name tells."""
        last = self.head.split(" ")[-1]
        return bool(self.head) and self.name.split(" ")[-1] == last and (not last.endswith("s") or last.endswith(_MANY))

    def is_also(self, head: str) -> bool:
        """Whether "is there a HEAD" is true of this picture."""
        return head in self.accept or head in self.wider


class Library:
    """`held_out` names the held-out pictures by id where a set keeps back more than the collected split does."""

    def __init__(self, folder: Path, split: Split, held_out: frozenset[str] | None = None) -> None:
        self.folder, self.split, self.held_out = folder, split, held_out
        self._decoded: dict[str, Image.Image] = {}

    @cached_property
    def all(self) -> list[Entry]:
        files = ("pictures.jsonl", *((ADDED[self.split],) if self.split in ADDED else ()))
        lines = [line for file in files for line in (self.folder / file).read_text(encoding="utf-8").splitlines()]
        found = [_entry(json.loads(line)) for line in lines]
        if self.held_out is None:
            return found
        seen = {entry.head for entry in found if entry.id not in self.held_out}
        sides: dict[bool, Split] = {True: "heldout", False: "train"}
        return [replace(e, split=sides[e.id in self.held_out], name_seen=e.head in seen) for e in found]

    @cached_property
    def entries(self) -> list[Entry]:
        return [entry for entry in self.all if entry.split == self.split]

    @cached_property
    def drawings(self) -> list[Entry]:
        """Entries with a name."""
        return [entry for entry in self.entries if entry.name and not entry.background]

    @cached_property
    def cutouts(self) -> dict[str, list[Entry]]:
        """Cut-outs of one thing by head; held-out ones only where training knows the name."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.cutout and entry.single and entry.name_seen and not entry.proper and _handy(entry):
                found.setdefault(entry.head, []).append(entry)
        return found

    @cached_property
    def heads(self) -> list[str]:
        return sorted(self.cutouts)

    @cached_property
    def head_shares(self) -> np.ndarray:
        """Chance of each head: by the root of its number of pictures, so that faces do not crowd the rest out."""
        counts = np.sqrt([len(self.cutouts[head]) for head in self.heads])
        return np.asarray(counts / counts.sum())

    @cached_property
    def coloured(self) -> list[str]:
        """Heads with a cut-out of one clear colour."""
        return [head for head in self.heads if any(e.colour for e in self.cutouts[head])]

    @cached_property
    def known_heads(self) -> dict[str, str]:
        """Head -> kind of thing over what the ViT learns: what a question may ask for in vain."""
        learned = [e for e in self.all if e.split in ("train", "kinds")]
        singles = [e for e in learned if e.single and not e.proper and e.head not in _GENERAL]
        return {e.head: e.group_kind for e in singles}

    @cached_property
    def heads_of_kind(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for head, kind in sorted(self.known_heads.items()):
            found.setdefault(kind, []).append(head)
        return found

    @cached_property
    def backgrounds(self) -> list[Entry]:
        """Of the split; added drawings stand on those of training."""
        split = "train" if self.split in ADDED else self.split
        return [entry for entry in self.all if entry.background and entry.split == split]

    def picture(self, entry: Entry) -> Image.Image:
        """Decoded, small enough to be pasted: RGBA cut-out or RGB photo."""
        if entry.id not in self._decoded:
            image = Image.open(self.folder / entry.file).convert("RGBA" if entry.cutout else "RGB")
            side = BACKGROUND_PX if entry.background else CUTOUT_PX
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
            self._decoded[entry.id] = image
        return self._decoded[entry.id]

    def original(self, entry: Entry) -> Image.Image:
        """As collected."""
        return Image.open(self.folder / entry.file)

    def warm(self) -> None:
        """Decode everything scenes use, before worker processes fork."""
        for entry in [*self.backgrounds, *(e for found in self.cutouts.values() for e in found)]:
            self.picture(entry)


def _handy(entry: Entry) -> bool:
    return (
        1 / 3.5 <= entry.width / entry.height <= 3.5
        and entry.fill > 0.12
        and entry.parts == 1
        and len(entry.head) <= 24
    )


def _entry(row: dict) -> Entry:
    fields = {name: row[name] for name in Entry.__dataclass_fields__ if name in row}
    return Entry(**{**fields, "accept": tuple(row["accept"]), "wider": frozenset(row["wider"]),
                    "captions": tuple(row["captions"]), "keywords": tuple(row["keywords"])})  # fmt: skip
