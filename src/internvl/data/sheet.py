"""A contact sheet: samples of a JSONL with their questions and answers, boxes drawn in. For people's eyes only."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, CELL_PX, PICTURE_PX, LINE_PX = 6, 210, 176, 12
_BOX = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")


def sheet(path: Path, number: int = 30, seed: int = 0) -> Image.Image:
    """Random lines of a training or held-out file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no lines to show")
    chosen = np.random.default_rng(seed).permutation(len(lines))[:number]
    cells = [_cell(json.loads(lines[int(place)]), path) for place in sorted(chosen)]
    height = max(cell.height for cell in cells)
    rows = -(-len(cells) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * CELL_PX, rows * height), "white")
    for place, cell in enumerate(cells):
        whole.paste(cell, (place % COLUMNS * CELL_PX, place // COLUMNS * height))
    return whole


def _cell(row: dict[str, Any], path: Path) -> Image.Image:
    texts = _texts(row)
    picture = _open(row, path)
    draw = ImageDraw.Draw(picture)
    for values in _BOX.findall(" ".join(text for _, text in texts)):
        sides = [int(v) * side / 1000 for v, side in zip(values, picture.size * 2, strict=True)]
        if sides[0] < sides[2] and sides[1] < sides[3]:
            draw.rectangle(sides, outline="red", width=2)
    picture.thumbnail((CELL_PX - 8, PICTURE_PX))
    lines = [(who, line) for who, text in texts for line in textwrap.wrap(f"{who} {text}", 36)[:5]]
    cell = Image.new("RGB", (CELL_PX, PICTURE_PX + 8 + LINE_PX * (len(lines) + 1)), "white")
    cell.paste(picture, (4, 4))
    font, pen = ImageFont.load_default(10), ImageDraw.Draw(cell)
    for place, (who, line) in enumerate(lines):
        pen.text((4, PICTURE_PX + 8 + place * LINE_PX), line, fill="black" if who == "Q" else "blue", font=font)
    return cell


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
