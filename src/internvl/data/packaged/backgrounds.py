"""Landscape and texture photos (Debian: mate-backgrounds)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from internvl.data.packaged.common import Found


def read(root: Path) -> Iterator[Found]:
    for path in sorted((root / "usr/share/backgrounds/mate/nature").glob("*.jpg")):
        yield Found(path.read_bytes(), path.name, "mate-backgrounds", "background", "", series=f"mate/{path.stem}")
