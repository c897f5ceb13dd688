"""Pictures with several captions: Karpathy's JSON, COCO's own, cleaning, and counts of what is unusual.

What a model does with a long caption is its tokenizer's; here it is counted, so that a run says it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl.data.labelled import report
from internvl.data.records import Problem

MAX_WORDS = 50
MAX_TOKENS = 80
"""Prefix, start and end included; longer texts are cut there by the tokenizer (official internvl_g, InternVL-C, -G)."""
_CLEANED = re.compile(r'[.!"()*#:;~]')


@dataclass(frozen=True)
class Captioned:
    """A picture, or a video, and what people wrote about it."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CaptionSet:
    items: tuple[Captioned, ...]
    empty: int = 0
    """Captions without a letter or sign, left out."""
    bare: int = 0
    """Pictures whose captions were all empty, left out."""
    left_out: int = 0
    """Entries that could not be used."""
    bare_pictures: tuple[Path, ...] = ()
    """Those of `bare`."""

    @property
    def captions(self) -> list[str]:
        """All captions, picture by picture."""
        return [caption for item in self.items for caption in item.captions]

    @property
    def image_of_text(self) -> list[int]:
        """Place of the picture of each caption, as `evaluate.retrieve` wants it."""
        return [place for place, item in enumerate(self.items) for _ in item.captions]


def clean_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """Lower case, without . ! " ( ) * # : ; ~, single spaces, at most 50 words (official retrieval, all but XTD).

    Other scripts keep their letters and their own punctuation. Words are what spaces part, so Chinese is not cut.
    """
    return " ".join(_CLEANED.sub(" ", caption.lower()).split()[:max_words])


def check_unicode(text: str) -> str:
    """The text; ValueError for half a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "replace").decode()[:40]
        raise ValueError(
            f"{shown!r} is no Unicode at character {error.start}, half a surrogate pair; repair or remove it"
        ) from error
    return text


def read_karpathy(
    path: str | Path, root: str | Path, split: str = "test", problems: list[Problem] | None = None
) -> CaptionSet:
    """dataset_coco.json, dataset_flickr30k.json: pictures of a split with their captions, paths below `root`.

    `restval` of COCO belongs to the split `train`. Errors name file and entry; with `problems`, they are listed.
    """
    entries = load_list(path, "images")
    wanted = ("train", "restval") if split == "train" else (split,)
    pairs, left_out = [], 0
    splits: Counter[str] = Counter()
    for number, entry in enumerate(entries):
        try:
            splits[field_of(entry, "split", str)] += 1
            if entry["split"] not in wanted:
                continue
            sentences = [field_of(one, "raw", str) for one in field_of(entry, "sentences", list)]
            folder = field_of(entry, "filepath", str) if "filepath" in entry else ""  # COCO's file has it, Flickr's not
            pairs.append((Path(root, folder, field_of(entry, "filename", str)), sentences))
        except ValueError as error:
            left_out += 1
            report(f"{path}: images[{number}]", str(error), problems)
    if not pairs and not left_out:
        raise ValueError(f"{path}: no picture of split {split!r}; there are {said_splits(splits)}: choose one")
    return gather(pairs, f"{path}, split {split!r}", left_out, problems)


def read_coco(path: str | Path, root: str | Path, problems: list[Problem] | None = None) -> CaptionSet:
    """captions_val2014.json and its like (also NoCaps): `images` and `annotations` joined by `image_id`."""
    images, notes = load_list(path, "images"), load_list(path, "annotations")
    files: dict[int | str, Path] = {}
    texts: dict[int | str, list[str]] = {}
    left_out = 0
    for number, entry in enumerate(images):
        try:
            name = field_of(entry, "id", (int, str))
            if name in files:
                raise ValueError(f"id {name!r} stands twice; make ids unique")
            files[name], texts[name] = Path(root, field_of(entry, "file_name", str)), []
        except ValueError as error:
            left_out += 1
            report(f"{path}: images[{number}]", str(error), problems)
    for number, entry in enumerate(notes):
        try:
            name = field_of(entry, "image_id", (int, str))
            if name not in files:
                raise ValueError(f"image_id {name!r} is no picture of this file; add the picture or remove the entry")
            texts[name].append(field_of(entry, "caption", str))
        except ValueError as error:
            left_out += 1
            report(f"{path}: annotations[{number}]", str(error), problems)
    return gather([(files[name], texts[name]) for name in files], str(path), left_out, problems)


def said_splits(splits: Mapping[str, int]) -> str:
    """Splits of a file and how many entries each has, for messages."""
    return ", ".join(f"{name!r} ({count})" for name, count in sorted(splits.items())) or "none"


def gather(
    pairs: Sequence[tuple[Path, Sequence[str]]],
    source: str,
    left_out: int = 0,
    problems: Sequence[Problem] | None = None,
) -> CaptionSet:
    """Pictures with their captions, empty ones left out and counted. ValueError, with the first of `problems`, where
    nothing is left."""
    items, empty, bare = [], 0, []
    for path, sentences in pairs:
        kept = tuple(one.strip() for one in sentences if one.strip())
        empty += len(sentences) - len(kept)
        if kept:
            items.append(Captioned(path, kept))
        else:
            bare.append(path)
    if not items:
        first = f"the first problem: {problems[0].source}: {problems[0].message}" if problems else "check the file"
        raise ValueError(f"{source}: no picture with a caption ({len(bare)} without, {left_out} unusable); {first}")
    return CaptionSet(tuple(items), empty, len(bare), left_out, tuple(bare))


def load_list(path: str | Path, field: str) -> list[Any]:
    try:
        data = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from error
    entries = data.get(field) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: no list `{field}`; this is not a file of that layout")
    return entries


def field_of(entry: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        shown = entry.get(name) if isinstance(entry, dict) else entry
        raise ValueError(f"`{name}` is {str(shown)[:60]!r}; the layout wants another kind of value")
    if isinstance(entry[name], str):
        check_unicode(entry[name])
    return entry[name]
