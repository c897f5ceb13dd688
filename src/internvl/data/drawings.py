"""Named drawings beside the collected pictures, for what is to be read by eyes that do not know them.

A language model that learns on pictures which the ViT has learned meets sure tokens alone; on others tokens are unsure.
These drawings are for stage 2 only: no set that the align stage reads has them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data.collect import FAR, NEAR, Picture, look, named, normalise, wordnet
from internvl.data.library import DRAWINGS as DRAWINGS_FILE
from internvl.data.packaged import iconify
from internvl.data.packaged.common import Found
from internvl.data.packaged.openmoji import plain_symbol
from internvl.fetch import fetch, locked
from internvl.packages import DRAWINGS

FOLDER = "drawings"


def add(collected: Path, workers: int = 2) -> Path:
    """`drawings.jsonl` and its pictures in a collected folder, unless they are there."""
    target = collected / DRAWINGS_FILE
    with locked(target):
        if not target.is_file():
            _add(collected, target, workers)
    return target


def sources() -> Iterator[Found]:
    for package in DRAWINGS:
        yield from iconify.read(fetch(package), package.rpartition("/")[2])


def _add(collected: Path, target: Path, workers: int) -> None:
    (collected / FOLDER).mkdir(exist_ok=True)
    nouns = wordnet()
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(normalise, sources(), chunksize=16)
        pictures = [p for p in map(partial(named, nouns=nouns), made) if p is not None]
    pictures = list({p.row["id"]: p for p in reversed(pictures)}.values())[::-1]
    rows = [json.loads(line) for line in (collected / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = []
    for picture in apart(pictures, rows, collected):
        picture.row["file"] = f"{FOLDER}/{picture.row['id']}.webp"
        (collected / picture.row["file"]).write_bytes(picture.encoded)
        lines.append(json.dumps(picture.row, ensure_ascii=False) + "\n")
    fresh = target.with_suffix(".part")
    fresh.write_text("".join(lines), encoding="utf-8")
    os.replace(fresh, target)


def apart(pictures: list[Picture], collected: list[dict[str, Any]], folder: Path) -> Iterator[Picture]:
    """Those of names that training knows, without what a held-out picture shows: the same emoji, or the same look."""
    known = {row["head"] for row in collected if row["split"] == "train" and row["head"]}
    held = [row for row in collected if row["split"] == "heldout"]
    emoji = [row for row in held if row["category"] == "emoji"]
    symbols, names = {plain_symbol(row["path"]) for row in emoji}, {row["name"] for row in emoji}
    looks = np.unpackbits(np.stack([look(Image.open(folder / row["file"]).convert("RGBA")) for row in held]), axis=-1)
    for picture in pictures:
        row = picture.row
        drawn = picture.series.removeprefix("emoji/")
        if row["head"] not in known or drawn in symbols or (_draws_emoji(row) and row["name"] in names):
            continue
        bits = np.unpackbits(picture.look, axis=-1)
        distance = (looks[:, :1] != bits[None]).sum(-1).min(1)
        same = np.array([other["head"] == row["head"] for other in held])
        if (distance <= np.where(same, FAR, NEAR)).any():
            continue
        yield Picture(
            row | {"split": "fresh", "group": row["id"], "name_seen": True}, picture.encoded, picture.look, ""
        )


def _draws_emoji(row: dict[str, Any]) -> bool:
    """Some sets of emoji give names and no code points."""
    return "emoji" in row["source"]
