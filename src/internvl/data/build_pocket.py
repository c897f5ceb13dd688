"""The training sets of `pocket` from the collected folder alone: official JSONL, images, meta.json, held-out questions.

Any number of processes gives the same result. Where the command line's packages are missing:
    PYTHONPATH=src python -m internvl.data.build_pocket --collected FOLDER --out FOLDER --workers 16
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data import heldout_pocket, pictures, places, questions, scenes, words
from internvl.data.asked import Asked, with_suffix
from internvl.data.library import Entry, Library
from internvl.data.scenes import Box

QUALITY = 90
FOLDER_FILES, CHUNK = 1000, 250
VARIANTS = 6
"""Records of each picture: other questions, another ground."""
CROWDED = 24
"""Pictures of one name beyond which each gets fewer records, so that emoji faces do not fill the set."""
STREAMS = {"scenes": 1, "words": 2, "pictures": 3, "easy_vqa": 4, "boxes": 5, "apart": 6, "counts": 7, "colours": 8}
"""First number of a record's seed, so that sets do not share random numbers."""
REPEATS = {
    "scenes": 1,
    "words": 0.8,
    "pictures": 0.6,
    "easy_vqa": 0.3,
    "boxes": 0.4,
    "apart": 0.5,
    "counts": 0.5,
    "colours": 0.5,
}
"""repeat_time of the meta JSON: scenes teach most, single shapes least."""


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


def build(plan: Plan, log: Callable[[str], None] = lambda line: None) -> dict[str, int]:
    """Everything below `plan.out`; returns the number of records by set."""
    plan.out.mkdir(parents=True, exist_ok=True)
    shop = Shop(plan, Library(plan.collected, "train"))
    shop.library.warm()  # decoded once, shared with the processes that fork below
    log(f"library: {len(shop.library.entries)} pictures, {len(shop.library.heads)} names in scenes")
    numbers = {
        "scenes": plan.scenes,
        "words": plan.words,
        "boxes": plan.boxes,
        "apart": plan.apart,
        "counts": plan.counts,
        "colours": plan.colours,
        "pictures": len(shop.pictures),
        "easy_vqa": len(shop.easy_vqa),
    }
    counts = {}
    for name, number in numbers.items():
        counts[name] = _write_set(shop, name, number)
        log(f"{name}: {counts[name]} records")
    heldout_pocket.unpack_easy_vqa(plan.collected, plan.out, "train")
    _write_meta(plan.out, counts)
    heldout_pocket.write(plan.collected, plan.out, plan.seed, shop.answers)
    heldout_pocket.write_known(plan.collected, plan.out / "known", plan.seed)
    log("held-out sets: done")
    return counts


def _write_meta(out: Path, counts: dict[str, int]) -> None:
    meta = {
        name: {
            "root": "", "annotation": f"{name}.jsonl", "data_augment": name != "easy_vqa", "repeat_time": REPEATS[name],
            "length": number,
        }
        for name, number in counts.items()
        if number
    }  # fmt: skip
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_set(shop: Shop, name: str, number: int) -> int:
    for place in range(0, number, FOLDER_FILES):
        (shop.plan.out / "images" / name / f"{place // FOLDER_FILES:03d}").mkdir(parents=True, exist_ok=True)
    chunks = [(name, start, min(start + CHUNK, number)) for start in range(0, number, CHUNK)]
    written = 0
    with open(shop.plan.out / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for line, asked in _mapped(shop, chunks):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
            for one in asked:
                kept = shop.answers.setdefault(one.task, [])
                if len(kept) < heldout_pocket.TRAIN_ANSWERS:
                    kept.append(heldout_pocket.row(f"{line['id']}-{len(kept)}", line["image"], one))
    return written


_SHARED: list[Shop] = []
"""What worker processes inherit by fork: the decoded pictures are too many to send."""


def _mapped(shop: Shop, chunks: list[tuple[str, int, int]]) -> Iterator[Made]:
    _SHARED[:] = [shop]
    if shop.plan.workers <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        for chunk in chunks:
            yield from _chunk(chunk)
        return
    with multiprocessing.get_context("fork").Pool(shop.plan.workers) as pool:
        for made in pool.imap(_chunk, chunks):
            yield from made


def _chunk(job: tuple[str, int, int]) -> list[Made]:
    name, start, stop = job
    made = (_MAKERS[name](_SHARED[0], index) for index in range(start, stop))
    return [one for one in made if one is not None]


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


_MAKERS: dict[str, Callable[[Shop, int], Made | None]] = {
    "scenes": make_scene, "words": make_words, "pictures": make_picture, "easy_vqa": make_easy_vqa,
    "boxes": make_boxes, "apart": make_apart, "counts": make_counts, "colours": make_colours,
}  # fmt: skip


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvl.data.build_pocket", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--collected", type=Path, required=True, help="folder that `internvl data collect` made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=Plan.scenes)
    parser.add_argument("--words", type=int, default=Plan.words)
    parser.add_argument("--boxes", type=int, default=Plan.boxes)
    parser.add_argument("--apart", type=int, default=Plan.apart)
    parser.add_argument("--counts", type=int, default=Plan.counts)
    parser.add_argument("--colours", type=int, default=Plan.colours)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    plan = Plan(**vars(parser.parse_args(arguments)))
    build(plan, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
