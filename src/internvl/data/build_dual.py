"""The sets of `pocket-dual` from the collected folder alone: pictures with captions in many languages, held-out sets.

Any number of processes gives the same result. What is held out is `heldout_dual.py`'s to say.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data import heldout_dual, scenes
from internvl.data.heldout_dual import LEAST_CAPTIONS, MASK_CLASSES, class_of
from internvl.data.library import Entry, Library, Split
from internvl.data.multilingual import EMOJI, ENGLISH, Captions, read_captions

QUALITY = 90
CUTOUT_PX, PHOTO_PX = 224, 256
"""Side of the white square of a cut-out; longest side of a photo. The model squashes either to 224 px."""
FULL = 0.95
"""Longest side of a cut-out as a share of its square."""
REPEATS = {"english": 4.0, "stamps": 0.25, "emoji": 0.15, "quiz": 0.3}
"""repeat_time of the meta JSON: slightly more English than other languages, whose longer rows cost more."""
SCENES_STREAM = 200
"""First number of the seeds of scenes with masks; pocket's sets use smaller ones."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    collected: Path
    out: Path
    scenes: int = 300
    """Composed scenes with masks for training; a third of that for validation."""
    seed: int = 0
    workers: int = 2


@dataclass
class Shop:
    """Everything that lines are made from."""

    plan: Plan

    @cached_property
    def captions(self) -> dict[str, Captions]:
        return read_captions(self.plan.collected)

    @cached_property
    def split(self) -> heldout_dual.Split:
        return heldout_dual.split(Library(self.plan.collected, "train").all)

    def library(self, side: Split) -> Library:
        return Library(self.plan.collected, side, self.split.held_out)

    def told(self, side: Split) -> list[Entry]:
        """Pictures of one side that have a caption."""
        return [entry for entry in self.library(side).entries if entry.id in self.captions]


def build(plan: Plan, log: Callable[[str], None] = lambda line: None) -> dict[str, int]:
    """Everything below `plan.out`; returns the number of lines by training set."""
    shop = Shop(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    pictures = [*shop.told("train"), *shop.told("heldout")]
    log(f"{len(pictures)} pictures, {len(shop.split.held_out)} held out")
    for entry in pictures:
        (plan.out / image_path(entry)).parent.mkdir(parents=True, exist_ok=True)
    _each(partial(_write_picture, plan.collected, plan.out), pictures, plan.workers)
    train = {name: list(lines) for name, lines in training_sets(shop).items()}
    _write_sets(plan.out, train, REPEATS)
    _write_sets(plan.out / "heldout", heldout_sets(shop), {})
    for language, lines in stamp_tests(shop).items():
        _write_lines(plan.out / "heldout" / "stamps" / f"{language}.jsonl", lines)
    _write_classes(shop)
    _write_masks(shop)
    counts = {name: len(lines) for name, lines in train.items()}
    log(", ".join(f"{name}: {count} lines" for name, count in counts.items()))
    return counts


def image_path(entry: Entry) -> str:
    """Below the built folder."""
    return f"images/{entry.id[:2]}/{entry.id}.jpg"


def draw(picture: Image.Image, cutout: bool) -> Image.Image:
    """A cut-out in the middle of a white square, a photo as it is."""
    if not cutout:
        photo = picture.convert("RGB")
        photo.thumbnail((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
        return photo
    patch = picture.convert("RGBA")
    scale = FULL * CUTOUT_PX / max(patch.size)
    patch = patch.resize(
        (max(1, round(patch.width * scale)), max(1, round(patch.height * scale))), Image.Resampling.BICUBIC
    )
    square = Image.new("RGB", (CUTOUT_PX, CUTOUT_PX), "white")
    square.paste(patch, ((CUTOUT_PX - patch.width) // 2, (CUTOUT_PX - patch.height) // 2), patch)
    return square


def training_sets(shop: Shop) -> dict[str, Iterator[Line]]:
    """English lines of all pictures; lines of other languages by source."""
    told = shop.told("train")
    return {
        "english": _lines(shop, told, "", english=True),
        "stamps": _lines(shop, [e for e in told if e.source == "stamps"], "", english=False),
        "emoji": _lines(shop, [e for e in told if e.source in EMOJI], "", english=False),
        "quiz": _lines(shop, [e for e in told if e.source == "gcompris"], "", english=False),
    }


def heldout_sets(shop: Shop) -> dict[str, list[Line]]:
    """The hundred stamps; every held-out picture in English, and in the other languages."""
    told = shop.told("heldout")
    hundred = [entry for entry in told if entry.id in shop.split.stamps]
    return {
        "stamps": list(_lines(shop, hundred, "../", english=True)),
        "english": list(_lines(shop, told, "../", english=True)),
        "languages": list(_lines(shop, told, "../", english=False)),
    }


def stamp_tests(shop: Shop) -> dict[str, list[Line]]:
    """Language -> the hundred stamps with their captions in it, for every language that knows nearly all of them."""
    hundred = [entry for entry in shop.told("heldout") if entry.id in shop.split.stamps]
    lines = [*_lines(shop, hundred, "../../", english=True), *_lines(shop, hundred, "../../", english=False)]
    by_language: dict[str, list[Line]] = {}
    for line in lines:
        by_language.setdefault(line["language"], []).append(line)
    return {language: found for language, found in sorted(by_language.items()) if len(found) >= LEAST_CAPTIONS}


def _lines(shop: Shop, entries: Iterable[Entry], up: str, english: bool) -> Iterator[Line]:
    """One line a picture and language; several captions as a list."""
    for entry in entries:
        for language, texts in shop.captions[entry.id].items():
            if (language == ENGLISH) == english:
                caption = texts[0] if len(texts) == 1 else texts
                yield {"id": f"{entry.id}-{language}", "image": up + image_path(entry), "caption": caption,
                       "language": language}  # fmt: skip


def _write_lines(path: Path, lines: Iterable[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _write_sets(folder: Path, sets: dict[str, list[Line]], repeats: dict[str, float]) -> None:
    for name, lines in sets.items():
        _write_lines(folder / f"{name}.jsonl", lines)
    meta = {
        name: {"root": "", "annotation": f"{name}.jsonl", "repeat_time": repeats.get(name, 1), "length": len(lines)}
        for name, lines in sets.items()
        if lines
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_picture(collected: Path, out: Path, entry: Entry) -> None:
    with Image.open(collected / entry.file) as picture:
        draw(picture, entry.cutout).save(out / image_path(entry), "JPEG", quality=QUALITY)


def _write_classes(shop: Shop) -> None:
    """classes/train and classes/heldout: a folder for each class of photos."""
    for side in ("train", "heldout"):
        for entry in shop.told(side):
            name = class_of(entry)
            if name:
                folder = shop.plan.out / "classes" / side / name
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(shop.plan.out / image_path(entry), folder / f"{entry.id}.jpg")


def _write_masks(shop: Shop) -> None:
    """masks/: composed scenes in the ADE20K layout; classes are kinds of things, in classes.txt, the first is 1."""
    plan, folder = shop.plan, shop.plan.out / "masks"
    sides: tuple[tuple[str, Split, int], ...] = (
        ("training", "train", plan.scenes), ("validation", "heldout", plan.scenes // 3),
    )  # fmt: skip
    for place, (name, side, number) in enumerate(sides):
        for part in ("images", "annotations"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        library = shop.library(side)
        if library.heads:
            make = partial(_write_scene, library, folder, name, (plan.seed, SCENES_STREAM + place))
            _each(make, range(number), plan.workers)
    (folder / "classes.txt").write_text("\n".join(MASK_CLASSES) + "\n")


def _write_scene(library: Library, folder: Path, name: str, seed: tuple[int, int], number: int) -> None:
    """A scene's seed is its own, so that the number of processes changes nothing."""
    scene = scenes.compose(library, np.random.default_rng((*seed, number)), "mixed", small=True)
    scene.image.save(folder / "images" / name / f"{number:05d}.jpg", "JPEG", quality=QUALITY)
    heldout_dual.mask(scene).save(folder / "annotations" / name / f"{number:05d}.png")


def _each(call: Callable[[Any], None], items: Iterable[Any], workers: int) -> None:
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        for _ in pool.map(call, items, chunksize=32) if pool else map(call, items):
            pass
