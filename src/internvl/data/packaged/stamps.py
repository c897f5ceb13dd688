"""Stamps of Tux Paint: cut-outs with a caption in many languages (Debian: tuxpaint-stamps-default)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from internvl.data.packaged.common import Found, Kind

_SKIPPED = "symbols/"
"""Coins, notes, sign language and letters of many scripts: rendered words teach reading better."""


def folder(root: Path) -> Path:
    """What the paths of the pictures are relative to."""
    return root / "usr/share/tuxpaint/stamps"


def read(root: Path) -> Iterator[Found]:
    base = folder(root)
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base).as_posix()
        text = path.with_suffix(".txt")
        if path.suffix not in (".png", ".svg") or path.stem.endswith(("_mirror", "_flip")) or not text.is_file():
            continue
        captions = captions_of(text)
        if not captions.get("en") or relative.startswith(_SKIPPED):
            continue
        folders = [part for part in relative.split("/")[:-1] if part != "cartoon"]
        drawn = path.suffix == ".svg" or "/cartoon/" in relative
        kind: Kind = "drawing" if drawn else "photo"
        yield Found(
            data=path.read_bytes(),
            path=relative,
            source="stamps",
            kind=kind,
            title=captions["en"],
            captions=(captions["en"],),
            names={to: _bare(captions[of]) for to, of in (("fr", "fr"), ("zh", "zh_CN")) if captions.get(of)},
            keywords=tuple(folders),
            category=folders[0],
            series="stamps/" + re.sub(r"[-_ ]?\d+$", "", relative.rsplit(".", 1)[0]),
        )


def captions_of(path: Path) -> dict[str, str]:
    """Language as the file spells it (fr, zh_CN, sr@latin) -> caption; `path` is the stamp's text file."""
    lines = [x for x in path.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip() and x[0] != "#"]
    captions = {"en": lines[0].strip()} if lines else {}
    for line in lines[1:]:
        found = re.match(r"^([\w@]+)\.utf8=(.*)$", line)
        if found:
            captions[found[1]] = found[2].strip()
    return captions


def _bare(caption: str) -> str:
    return caption.rstrip(".!。！，, ").strip()
