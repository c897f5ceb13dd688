"""Named drawings beside the collected pictures, in two pools; none looks like a picture that is held out.

`fresh`: a language model that learns on pictures which the ViT has learned meets sure tokens alone; on others tokens
are unsure. These drawings are for stage 2 only: no set that the align stage reads has them, and none shows an emoji
that is held out. `kinds`: emoji by other artists than those of the collected pictures, which the ViT does learn: a
held-out picture is a drawing never seen, of a kind that may be known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from internvl.data.collect import FAR, NEAR, Picture, look, named, normalise, wordnet
from internvl.data.library import ADDED
from internvl.data.packaged import iconify
from internvl.data.packaged.common import Found
from internvl.data.packaged.openmoji import plain_symbol
from internvl.fetch import fetch, locked
from internvl.packages import DRAWINGS, KINDS

Pool = Literal["fresh", "kinds"]
PACKAGES: dict[Pool, tuple[str, ...]] = {"fresh": DRAWINGS, "kinds": KINDS}


def add(collected: Path, pool: Pool = "fresh", workers: int = 2) -> Path:
    """The pool's file and its pictures in a collected folder, unless they are there."""
    target = collected / ADDED[pool]
    with locked(target):
        if not target.is_file():
            _add(collected, target, pool, workers)
    return target


def sources(pool: Pool) -> Iterator[Found]:
    for package in PACKAGES[pool]:
        yield from iconify.read(fetch(package), package.rpartition("/")[2])


def _add(collected: Path, target: Path, pool: Pool, workers: int) -> None:
    (collected / target.stem).mkdir(exist_ok=True)
    nouns = wordnet()
    with ProcessPoolExecutor(workers) as workshop:
        made = workshop.map(normalise, sources(pool), chunksize=16)
        pictures = [p for p in map(partial(named, nouns=nouns), made) if p is not None]
    pictures = list({p.row["id"]: p for p in reversed(pictures)}.values())[::-1]
    rows = [json.loads(line) for line in (collected / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = []
    for picture in apart(pictures, rows, collected, pool):
        picture.row["file"] = f"{target.stem}/{picture.row['id']}.webp"
        (collected / picture.row["file"]).write_bytes(picture.encoded)
        lines.append(json.dumps(picture.row, ensure_ascii=False) + "\n")
    fresh = target.with_suffix(".part")
    fresh.write_text("".join(lines), encoding="utf-8")
    os.replace(fresh, target)


def apart(
    pictures: list[Picture], collected: list[dict[str, Any]], folder: Path, pool: Pool = "fresh"
) -> Iterator[Picture]:
    """Those that no held-out picture looks like; fresh ones, of names that training knows and of no held-out emoji."""
    known = {row["head"] for row in collected if row["split"] == "train" and row["head"]}
    held = [row for row in collected if row["split"] == "heldout"]
    emoji = [row for row in held if row["category"] == "emoji"]
    symbols, names = {plain_symbol(row["path"]) for row in emoji}, {row["name"] for row in emoji}
    looks = np.unpackbits(np.stack([look(Image.open(folder / row["file"]).convert("RGBA")) for row in held]), axis=-1)
    for picture in pictures:
        row = picture.row
        drawn = picture.series.removeprefix("emoji/")
        shown = drawn in symbols or (_draws_emoji(row) and row["name"] in names)
        if not row["head"] or (pool == "fresh" and (row["head"] not in known or shown)):
            continue
        bits = np.unpackbits(picture.look, axis=-1)
        distance = (looks[:, :1] != bits[None]).sum(-1).min(1)
        same = np.array([other["head"] == row["head"] for other in held])
        if (distance <= np.where(same, FAR, NEAR)).any():
            continue
        yield Picture(row | {"split": pool, "group": row["id"], "name_seen": True}, picture.encoded, picture.look, "")


def _draws_emoji(row: dict[str, Any]) -> bool:
    """Some sets of emoji give names and no code points."""
    return "emoji" in row["source"]
