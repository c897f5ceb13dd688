"""One training record of `pocket` at a time, from the collected folder: how many of each set is build_pocket.py's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data import pictures, places, questions, scenes, words
from internvl.data.asked import Asked, with_suffix
from internvl.data.library import Entry, Library
from internvl.data.scenes import Box

QUALITY = 90
FOLDER_FILES = 1000
VARIANTS = 6
"""Records of each picture: other questions, another ground."""
CROWDED = 24
"""Pictures of one name beyond which each gets fewer records, so that emoji faces do not fill the set."""
STREAMS = {
    "scenes": 1,
    "words": 2,
    "pictures": 3,
    "easy_vqa": 4,
    "boxes": 5,
    "apart": 6,
    "counts": 7,
    "colours": 8,
    "fresh": 9,
    "many": 10,
    "kinds": 11,
}
"""First number of a record's seed, so that sets do not share random numbers."""


@dataclass(frozen=True)
class Plan:
    collected: Path
    out: Path
    scenes: int = 60_000
    words: int = 25_000
    boxes: int = 20_000
    apart: int = 20_000
    counts: int = 15_000
    colours: int = 15_000
    fresh: int = 20_000
    many: int = 20_000
    kinds: int = 20_000
    seed: int = 0
    workers: int = 2


Made = tuple[dict[str, Any], list[Asked]]


@dataclass
class Shop:
    """What every record is made from."""

    plan: Plan
    library: Library
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Training answers by task, as rows."""

    @cached_property
    def pictures(self) -> list[Entry]:
        """Each training picture as often as it gets a record."""
        crowd = Counter(entry.head for entry in self.library.entries if entry.head)
        told = [entry for entry in self.library.entries if pictures.caption_of(entry)]
        shares = [min(1.0, CROWDED / crowd[entry.head]) if entry.head else 1.0 for entry in told]
        return [e for e, share in zip(told, shares, strict=True) for _ in range(max(2, round(VARIANTS * share)))]

    @cached_property
    def fresh(self) -> Library:
        """Drawings that only records without `regions` show."""
        return Library(self.library.folder, "fresh")

    @cached_property
    def kinds(self) -> Library:
        """Emoji by other artists, of kinds that the collected pictures of training have and of others."""
        return Library(self.library.folder, "kinds")

    @cached_property
    def easy_vqa(self) -> list[tuple[int, list[tuple[str, str]]]]:
        """Picture number with two or three of its questions: every training question once, in its own words."""
        by_picture: dict[int, list[tuple[str, str]]] = {}
        for question, answer, number in json.loads((self.plan.collected / "easy_vqa" / "train.json").read_text()):
            by_picture.setdefault(number, []).append((question, answer))
        parts = []
        for number, asked in sorted(by_picture.items()):
            order = np.random.default_rng((7, number)).permutation(len(asked))
            size = 3 if len(asked) % 3 != 1 else 2
            parts += [(number, [asked[k] for k in order[at : at + size]]) for at in range(0, len(asked), size)]
        return parts

    def generator(self, name: str, index: int) -> np.random.Generator:
        """Each record's own, so that the number of processes changes nothing."""
        return np.random.default_rng((self.plan.seed, STREAMS[name], index))

    def save(self, image: Image.Image, name: str, index: int) -> str:
        """Path below `plan.out` of the JPEG that was written."""
        path = f"images/{name}/{index // FOLDER_FILES:03d}/{index:06d}.jpg"
        image.convert("RGB").save(self.plan.out / path, "JPEG", quality=QUALITY)
        return path


def record(
    name: str,
    index: int,
    image: str,
    size: tuple[int, int],
    asked: list[Asked],
    rng: np.random.Generator,
    regions: list[tuple[str, Box]] | None = None,
) -> dict[str, Any]:
    """One official JSONL line, with what is where in the picture for the alignment of the connector."""
    turns = []
    for place, one in enumerate(asked):
        mark = "" if place else "<image>\n"
        turns += [{"from": "human", "value": mark + with_suffix(one, rng)}, {"from": "gpt", "value": one.answer}]
    line = {"id": f"{name}-{index}", "image": image, "width": size[0], "height": size[1], "conversations": turns}
    return line | ({"regions": [{"text": text, "box": box} for text, box in regions]} if regions else {})


def make_scene(shop: Shop, index: int) -> Made | None:
    rng = shop.generator("scenes", index)
    scene = scenes.compose(shop.library, rng)
    asked = questions.conversation(scene, shop.library, rng)
    if not asked:
        return None
    return _of_scene(shop, "scenes", index, scene, asked, rng), asked


def make_boxes(shop: Shop, index: int) -> Made | None:
    """A scene, every other one with a single thing, where all that is asked is where things are."""
    rng = shop.generator("boxes", index)
    scene = scenes.compose(shop.library, rng, most=1 if index % 2 else None)
    asked = places.boxes(scene, rng)
    return (_of_scene(shop, "boxes", index, scene, asked, rng), []) if asked else None


def make_apart(shop: Shop, index: int) -> Made | None:
    """A scene of which one to three things are asked that do not tell of each other."""
    rng = shop.generator("apart", index)
    scene = scenes.compose(shop.library, rng)
    asked = questions.apart(scene, shop.library, rng)
    return (_of_scene(shop, "apart", index, scene, asked, rng), []) if asked else None


def make_counts(shop: Shop, index: int) -> Made | None:
    """A crowd, every fourth one of shapes, where all that is asked is how many there are."""
    rng = shop.generator("counts", index)
    scene = scenes.compose(shop.library, rng, "count" if index % 4 else "shapes")
    asked = questions.apart(scene, shop.library, rng, {"count": 1.0})
    return (_of_scene(shop, "counts", index, scene, asked, rng), []) if asked else None


def make_colours(shop: Shop, index: int) -> Made | None:
    """A scene of cut-outs in colours that are not their own: what is asked can only be seen."""
    rng = shop.generator("colours", index)
    scene = scenes.compose(shop.library, rng, "colour", repainted=0.85)
    asked = questions.apart(scene, shop.library, rng, {"colour": 0.85, "yesno": 0.15})
    return (_of_scene(shop, "colours", index, scene, asked, rng), []) if asked else None


_FRESH: tuple[tuple[scenes.Kind, dict[str, float] | None, float], ...] = (
    ("mixed", None, 0.0),
    ("colour", None, 0.0),
    ("mixed", {"yesno": 1.0}, 0.3),
    ("count", None, 0.0),
    ("colour", {"colour": 0.85, "yesno": 0.15}, 0.5),
    ("mixed", None, 0.3),
    ("mixed", {"position": 1.0}, 0.3),
)
"""Kind of scene, what is asked of it, and how many cut-outs are painted anew, by number of the record."""


def make_fresh(shop: Shop, index: int) -> Made | None:
    """Drawings that the ViT does not know: seven scenes of a kind and questions each, then a drawing alone.

    Without `regions`, so that the align stage never learns them and none is told.
    """
    rng, library = shop.generator("fresh", index), shop.fresh
    if index % 8 == 7:
        entry = library.drawings[int(rng.integers(len(library.drawings)))]
        asked = pictures.conversation(library, entry, rng)
        image = pictures.show(library, entry, rng)
        return record("fresh", index, shop.save(image, "fresh", index), image.size, asked, rng), []
    kind, asking, repainted = _FRESH[index % 8]
    scene = scenes.compose(library, rng, kind, repainted=repainted)
    asked = questions.apart(scene, library, rng, asking)
    if not asked:
        return None
    return record("fresh", index, shop.save(scene.image, "fresh", index), scene.image.size, asked, rng), []


_MANY: tuple[tuple[scenes.Kind, str, float], ...] = (
    ("mixed", "yesno", 0.0),
    ("count", "count", 0.0),
    ("shapes", "yesno", 0.0),
    ("mixed", "yesno", 0.3),
    ("colour", "colour", 0.6),
    ("shapes", "count", 0.0),
    ("count", "yesno", 0.0),
    ("count", "count", 0.0),
)
"""Kind of scene, the one thing that is asked of all in it, and how many cut-outs are painted anew."""


def make_many(shop: Shop, index: int) -> Made | None:
    """A scene of which one question is asked again and again, of other things: more answers for a picture's tokens.

    Every other eight records, but for shapes, show fresh drawings, where they are asked for: without `regions`.
    """
    kind, task, repainted = _MANY[index % len(_MANY)]
    fresh = bool(shop.plan.fresh) and kind != "shapes" and index // len(_MANY) % 2 == 1
    library = shop.fresh if fresh else shop.library
    rng = shop.generator("many", index)
    scene = scenes.compose(library, rng, kind, repainted=repainted)
    asked = questions.several(scene, library, rng, task)
    crowded = task != "count" or any(int(one.answer) > 2 for one in asked)
    if not asked or not (crowded or rng.random() < 0.5):  # what finds no place is left out: few of four, five remain
        return None
    regions = None if fresh else scene.regions()
    return record("many", index, shop.save(scene.image, "many", index), scene.image.size, asked, rng, regions), []


_KINDS: tuple[tuple[scenes.Kind, float], ...] = (("mixed", 0.0), ("colour", 0.0), ("count", 0.0), ("mixed", 0.5))
"""Kind of scene, and how many cut-outs are painted anew."""


def make_kinds(shop: Shop, index: int) -> Made | None:
    """Emoji by other artists: one alone in every other record, else a scene of which things are asked apart."""
    rng, library = shop.generator("kinds", index), shop.kinds
    if index % 2:
        entry = library.drawings[int(rng.integers(len(library.drawings)))]
        asked = pictures.conversation(library, entry, rng)
        image, box = pictures.show_placed(library, entry, rng)
        regions = [pictures.region_of(entry, box)]
        return record("kinds", index, shop.save(image, "kinds", index), image.size, asked, rng, regions), []
    kind, repainted = _KINDS[index // 2 % len(_KINDS)]
    scene = scenes.compose(library, rng, kind, repainted=repainted)
    asked = questions.apart(scene, library, rng)
    return (_of_scene(shop, "kinds", index, scene, asked, rng), []) if asked else None


def _of_scene(
    shop: Shop, name: str, index: int, scene: scenes.Scene, asked: list[Asked], rng: np.random.Generator
) -> dict[str, Any]:
    return record(name, index, shop.save(scene.image, name, index), scene.image.size, asked, rng, scene.regions())


def make_words(shop: Shop, index: int) -> Made:
    rng = shop.generator("words", index)
    text = words.text_for(shop.library.folder, "train", rng)
    image, letters = words.render_placed(shop.library, text, rng)
    asked = [words.ask(text, rng)]
    line = record("words", index, shop.save(image, "words", index), image.size, asked, rng, letters)
    return line | {"spelled": True}, asked


def make_picture(shop: Shop, index: int) -> Made | None:
    rng = shop.generator("pictures", index)
    asked = pictures.conversation(shop.library, shop.pictures[index], rng)
    if not asked:
        return None
    entry = shop.pictures[index]
    image, box = pictures.show_placed(shop.library, entry, rng)
    regions = [pictures.region_of(entry, box)] if entry.name else []
    return record("pictures", index, shop.save(image, "pictures", index), image.size, asked, rng, regions), asked


def make_easy_vqa(shop: Shop, index: int) -> Made:
    number, pairs = shop.easy_vqa[index]
    asked = [Asked("easy_vqa", question, answer) for question, answer in pairs]
    image = f"images/easy_vqa/train/{number}.png"
    return record("easy_vqa", index, image, (64, 64), asked, shop.generator("easy_vqa", index)), asked


MAKERS: dict[str, Callable[[Shop, int], Made | None]] = {
    "scenes": make_scene, "words": make_words, "pictures": make_picture, "easy_vqa": make_easy_vqa,
    "boxes": make_boxes, "apart": make_apart, "counts": make_counts, "colours": make_colours,
    "fresh": make_fresh, "many": make_many, "kinds": make_kinds,
}  # fmt: skip
