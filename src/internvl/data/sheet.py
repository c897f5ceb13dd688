"""Contact sheets for people's eyes: samples of a JSONL with boxes drawn in, hits of a search; a picture or a page."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, CELL_PX, PICTURE_PX, LINE_PX = 6, 210, 176, 12
LINE_CHARACTERS, MAX_LINES = 36, 5
_BOX = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")
Line = tuple[str, str]
"""A text and its colour."""


@dataclass(frozen=True)
class Panel:
    """A picture, if there is one to show, and what is written below it."""

    picture: Image.Image | None
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Section:
    """Panels that belong together, such as the hits of one query."""

    title: str
    panels: tuple[Panel, ...]


def sheet(path: Path, number: int = 30, seed: int = 0) -> Image.Image:
    """Random lines of a training or held-out file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no lines to show")
    chosen = np.random.default_rng(seed).permutation(len(lines))[:number]
    return grid([_panel(json.loads(lines[int(place)]), path) for place in sorted(chosen)])


def grid(panels: Sequence[Panel]) -> Image.Image:
    """Six panels a row. Pillow's own letters are Latin: for other scripts take `page`."""
    cells = [_cell(panel) for panel in panels]
    height = max(cell.height for cell in cells)
    rows = -(-len(cells) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * CELL_PX, rows * height), "white")
    for place, cell in enumerate(cells):
        whole.paste(cell, (place % COLUMNS * CELL_PX, place // COLUMNS * height))
    return whole


def stacked(sections: Sequence[Section]) -> Image.Image:
    """Sections one below the other, each under its title."""
    parts = [(section.title, grid(section.panels)) for section in sections if section.panels]
    if not parts:
        raise ValueError("nothing to show; there are no hits")
    bar = 2 * LINE_PX
    whole = Image.new("RGB", (COLUMNS * CELL_PX, sum(part.height + bar for _, part in parts)), "white")
    font, pen, top = ImageFont.load_default(12), ImageDraw.Draw(whole), 0
    for title, part in parts:
        pen.text((4, top + 5), textwrap.shorten(title, 160), fill="black", font=font)
        whole.paste(part, (0, top + bar))
        top += part.height + bar
    return whole


def page(title: str, sections: Sequence[Section]) -> str:
    """The same as one HTML file that needs no other: thumbnails are inside, texts of any script are escaped."""
    parts = []
    for section in sections:
        cells = "".join(f"<figure>{_shown(p.picture)}{_written(p.lines)}</figure>" for p in section.panels)
        parts.append(f"<h2>{html.escape(section.title)}</h2><div>{cells}</div>")
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


_STYLE = (
    "body{font:14px sans-serif;margin:2em}div{display:flex;flex-wrap:wrap;gap:1em}"
    "figure{margin:0;width:210px}img{max-width:100%}p{margin:.2em 0;overflow-wrap:anywhere}"
)


def write_sheet(path: Path, title: str, sections: Sequence[Section]) -> None:
    """.html or .png, as the name says."""
    check_sheet(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".html":
        path.write_text(page(title, sections), encoding="utf-8")
    else:
        stacked(sections).save(path)


def check_sheet(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"{path}: a sheet ends in .html or .png")


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy that fits into a cell."""
    small = picture.copy()
    small.thumbnail((CELL_PX - 8, PICTURE_PX))
    return small


def _shown(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    with io.BytesIO() as buffer:
        thumbnail(picture).save(buffer, format="JPEG", quality=85)
        return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _written(lines: Sequence[Line]) -> str:
    return "".join(f'<p style="color:{html.escape(colour)}">{html.escape(text)}</p>' for text, colour in lines)


def _cell(panel: Panel) -> Image.Image:
    lines = [
        (part, colour) for text, colour in panel.lines for part in textwrap.wrap(text, LINE_CHARACTERS)[:MAX_LINES]
    ]
    room = 0 if panel.picture is None else PICTURE_PX
    cell = Image.new("RGB", (CELL_PX, room + 8 + LINE_PX * (len(lines) + 1)), "white")
    if panel.picture is not None:
        cell.paste(thumbnail(panel.picture), (4, 4))
    font, pen = ImageFont.load_default(10), ImageDraw.Draw(cell)
    for place, (line, colour) in enumerate(lines):
        pen.text((4, room + 8 + place * LINE_PX), line, fill=colour, font=font)
    return cell


def _panel(row: dict[str, Any], path: Path) -> Panel:
    texts = _texts(row)
    picture = _open(row, path)
    draw = ImageDraw.Draw(picture)
    for values in _BOX.findall(" ".join(text for _, text in texts)):
        sides = [int(v) * side / 1000 for v, side in zip(values, picture.size * 2, strict=True)]
        if sides[0] < sides[2] and sides[1] < sides[3]:
            draw.rectangle(sides, outline="red", width=2)
    return Panel(picture, tuple((f"{who} {text}", "black" if who == "Q" else "blue") for who, text in texts))


def _texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    if "conversations" in row:
        turns = row["conversations"]
        return [("A" if t["from"] == "gpt" else "Q", t["value"].replace("<image>\n", "")) for t in turns]
    return [("Q", row["question"]), ("A", row["answer"])]


def _open(row: dict[str, Any], path: Path) -> Image.Image:
    for folder in path.resolve().parents:
        if (folder / row["image"]).is_file():
            return Image.open(folder / row["image"]).convert("RGB")
    raise ValueError(f"{path}: {row['image']} is in none of the folders above it")
