"""Open Clip Art: drawings with titles and keywords (Debian: openclipart-png for pixels, openclipart-svg for words)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from internvl.data.packaged.common import Found

_KEPT = ("animals", "buildings", "computer/hardware", "containers", "decorations", "education", "electronics", "food",
         "geography/astronomy", "office", "people", "plants", "recreation", "science", "signs_and_symbols/weather",
         "signs_and_symbols/clocks", "signs_and_symbols/hazard", "tools", "transportation", "unsorted")  # fmt: skip
_SKIPPED = ("recreation/games/cards", "transportation/aiga-symbols", "transportation/roadsigns", "people/stickmen",
            "recreation/religion", "people/clothing/pantyhose", "unsorted/duplicates",
            "tools/weapons/hand")  # fmt: skip
_ITALIAN = re.compile(r"archit|_archi?_|_arc?_\d|_a_\d|francesc", re.I)
"""Marks in file names of an author whose titles are Italian."""
_VARIANT = re.compile(r"_?(?:bw|b_and_w|outline)(?=_|$)|[-_]*[0-9]*$")
_EMPTY = re.compile(r"clip ?arts?\b.*\bby\b|various|untitled|svg|collection|submission|^\W*$", re.I)


def read(pictures: Path, words: Path) -> Iterator[Found]:
    base, texts = pictures / "usr/share/openclipart/png", words / "usr/share/openclipart/svg"
    for path in sorted(base.rglob("*.png")):
        relative = path.relative_to(base).with_suffix("").as_posix()
        source = texts / f"{relative}.svg"
        kept = relative.startswith(_KEPT) and not relative.startswith(_SKIPPED) and not _ITALIAN.search(path.stem)
        if not kept or not source.is_file():
            continue
        svg = source.read_text(encoding="utf-8", errors="replace")
        if re.search(r'<image[^>]*href="(?!data:)', svg):  # drawn with a picture that was not at hand
            continue
        title = _tag(svg, "dc:title")
        if not title or _EMPTY.search(title):
            title = path.stem  # some series carry one title for all; the file's name is the better one
        description = _tag(svg, "dc:description")
        keywords = [html.unescape(k).strip().lower() for k in re.findall(r"<rdf:li[^>]*>([^<]*)</rdf:li>", svg)]
        folder, _, stem = relative.rpartition("/")
        yield Found(
            data=path.read_bytes(),
            path=relative + ".png",
            source="openclipart",
            kind="drawing",
            title=title,
            captions=(description,) if description and len(description.split()) > 4 else (),
            keywords=tuple(k for k in dict.fromkeys(keywords) if k and k not in ("unsorted", "hash")),
            category=folder.split("/")[0],
            series=f"openclipart/{folder}/{_VARIANT.sub('', stem)}",
        )


def _tag(svg: str, tag: str) -> str:
    found = re.search(rf"<{tag}[^>]*>([^<]*)</{tag}>", svg)
    return re.sub(r"\s+", " ", html.unescape(found[1])).strip() if found else ""
