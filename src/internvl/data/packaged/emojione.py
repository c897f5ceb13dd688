"""EmojiOne: a third style of the same drawings (Debian: ruby-gemojione, 64 px)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from internvl.data.packaged.common import Found
from internvl.data.packaged.openmoji import named


def read(drawings: Path, names: Path) -> Iterator[Found]:
    folder = next(drawings.rglob("assets/png"))
    for symbol, entry in named(names):
        path = folder / f"{ord(symbol[0]):04X}.png"
        if len(symbol) == 1 and path.is_file():
            yield Found(
                data=path.read_bytes(),
                path=path.name,
                source="emojione",
                kind="drawing",
                title=entry["en"],
                names={x: entry[x] for x in ("fr", "zh") if x in entry},
                category="emoji",
                series=f"emoji/{symbol}",
            )
