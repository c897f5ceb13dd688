"""Thirteen classes of stamps for judging an encoder, and all other collected pictures for training one.

Classes are the folders of Tux Paint's stamps with at least ten photos (213 pictures). No picture of a class is among
the others, so a class accuracy is that of held-out pictures. Collecting is collect.py's (`internvl data collect`).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from internvl.data.collect import collected_folder

LEAST = 10
SIDE = 256
"""Pixels of the pictures that are written."""


def on_white(path: Path, side: int = SIDE) -> Image.Image:
    """A cut-out on white, padded to a square: transparent pixels hold arbitrary colours."""
    with Image.open(path, formats=("WEBP", "PNG", "JPEG")) as opened:
        picture = opened.convert("RGBA")
    square = Image.new("RGBA", (max(picture.size),) * 2, "white")
    square.alpha_composite(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
    return square.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def read_classes(folder: Path | None = None) -> list[tuple[Path, str]]:
    """(picture, class) of every photo in a folder of stamps that has at least `LEAST` of them."""
    folder, rows = _rows(folder)
    photos = [row for row in rows if row["source"] == "stamps" and row["kind"] == "photo"]
    counts = Counter(_class(row) for row in photos)
    return [(folder / row["file"], _class(row)) for row in photos if counts[_class(row)] >= LEAST]


def write_others(out: Path, folder: Path | None = None, limit: int | None = None) -> Path:
    """Every picture that is in none of the classes, on white, and a JSONL that names them; photos first."""
    held_out = {path for path, _ in read_classes(folder)}
    folder, rows = _rows(folder)
    rows = sorted(
        (row for row in rows if folder / row["file"] not in held_out), key=lambda row: row["kind"] == "drawing"
    )
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows[:limit]:
        picture = pictures / f"{row['id']}.jpg"
        if not picture.is_file():
            on_white(folder / row["file"]).save(picture, quality=92)
        lines.append(json.dumps({"id": row["id"], "image": f"pictures/{picture.name}"}) + "\n")
    target = out / "pictures.jsonl"
    target.write_text("".join(lines), encoding="utf-8")
    return target


def _class(row: dict[str, Any]) -> str:
    return "/".join(row["keywords"])


def _rows(folder: Path | None) -> tuple[Path, list[dict[str, Any]]]:
    folder = folder or collected_folder()
    listing = folder / "pictures.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing}: no collected pictures; run `internvl data collect` first")
    return folder, [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
