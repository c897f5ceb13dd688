"""What `pocket-dual` is tested on, and so is not trained on: a hundred real stamps, all other held-out pictures.

Also the classes of photos and of masks. Writing the sets is `build_dual.py`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from internvl.data.library import Entry
from internvl.data.packaged.common import set_of
from internvl.data.scenes import Scene, Thing

NUM_STAMPS = 100
"""Captions to choose from in the small retrieval test, as in the baseline of a ridge regression."""
LEAST_CAPTIONS = 90
"""Of the hundred stamps: languages that caption fewer make no test of their own."""

KINDS = ("animal", "plant", "food", "person", "object")
"""Classes of the masks; `background` comes before them."""
GROUND = 1
"""Number of `background` in a mask; 0 is not scored (ADE20K)."""
CLEAR = 24
"""Opacity up to which a pixel shows what lies behind; as far from the other end it shows the thing."""
MASK_CLASSES = ("background", *KINDS)

_MAMMALS = set_of(
    "animals/mammals animals/mammals/bovines animals/mammals/rodents animals/mammals/aquatic animals/mammals/cats "
    "animals/mammals/deer animals/mammals/equines animals/mammals/apes animals/mammals/dogs animals/mammals/bears "
    "animals/mammals/camel animals/marsupials"
)
_CLASSES: dict[str, frozenset[str]] = {
    "bird": set_of("animals/birds"),
    "fish": set_of("animals/fish fishes"),
    "flower": set_of("plants/flowers"),
    "fruit": set_of("food/fruit"),
    "mammal": _MAMMALS,
    "monument": set_of("monument town/monuments"),
    "piece of clothing": set_of("clothes clothes/hats"),
    "planet": set_of("space/planets space/moon"),
    "road sign": set_of("town/roadsigns"),
    "tool": set_of("tools household/tools"),
    "vegetable": set_of("food/vegetables"),
    "vehicle": set_of(
        "vehicles vehicles/auto vehicles/emergency vehicles/ship vehicles/construction vehicles/cycle vehicles/flight "
        "vehicles/flight/planes vehicles/masstransit vehicles/race military/vehicles"
    ),
}
"""Class -> folders of the packages (stamps: the path of keywords; GCompris: the category)."""
CLASSES = tuple(sorted(_CLASSES))


@dataclass(frozen=True)
class Split:
    held_out: frozenset[str]
    """Ids of every picture that no training record shows."""
    stamps: tuple[str, ...]
    """Ids of the hundred: real photos, each with a caption that no other of them and no training stamp has."""


def split(entries: Iterable[Entry], num_stamps: int = NUM_STAMPS) -> Split:
    """Pocket's held-out groups, and of the others as many as give `num_stamps` captions of real stamps.

    Groups follow in the order of the number that already decided pocket's split (collect.py), so the set only grows. A
    caption goes with all its stamps. ValueError where there are too few.
    """
    every = list(entries)
    groups: dict[str, list[Entry]] = defaultdict(list)
    of_caption: dict[str, set[str]] = defaultdict(set)
    for entry in every:
        groups[entry.group].append(entry)
        if entry.source == "stamps":
            of_caption[caption_key(entry)].add(entry.group)
    held = _with_captions({e.group for e in every if e.split == "heldout"}, groups, of_caption)
    for group in sorted({e.group for e in every if is_real_stamp(e)}, key=_rank):
        if len(_captions(held, groups)) >= num_stamps:
            break
        held |= _with_captions({group}, groups, of_caption)
    chosen = _captions(held, groups)
    if len(chosen) < num_stamps:
        raise ValueError(f"{len(chosen)} captions of real stamps, {num_stamps} wanted; collect the stamps again")
    return Split(
        frozenset(entry.id for group in held for entry in groups[group]), tuple(sorted(chosen.values())[:num_stamps])
    )


def is_real_stamp(entry: Entry) -> bool:
    """A photo with its own caption, not a drawing."""
    return entry.source == "stamps" and entry.kind == "photo"


def caption_key(entry: Entry) -> str:
    """What makes two captions the same."""
    return entry.captions[0].casefold().strip(" .!")


def _rank(group: str) -> tuple[int, str]:
    return int(group[:8], 16) % 1000, group


def _with_captions(fresh: set[str], groups: Mapping[str, list[Entry]], of_caption: Mapping[str, set[str]]) -> set[str]:
    """These groups and all that share a caption with one of them, however far."""
    held: set[str] = set()
    waiting = sorted(fresh)
    while waiting:
        group = waiting.pop()
        if group not in held:
            held.add(group)
            waiting += [other for e in groups[group] if e.source == "stamps" for other in of_caption[caption_key(e)]]
    return held


def _captions(held: Iterable[str], groups: Mapping[str, list[Entry]]) -> dict[str, str]:
    """Caption -> the smallest id of its real stamps."""
    found: dict[str, str] = {}
    for entry in (entry for group in held for entry in groups[group]):
        if is_real_stamp(entry):
            key = caption_key(entry)
            found[key] = min(found.get(key, entry.id), entry.id)
    return found


def class_of(entry: Entry) -> str | None:
    """The class of a photo, by the folder that its package keeps it in; None for drawings and other things."""
    if entry.kind != "photo":
        return None
    folder = "/".join(entry.keywords) if entry.source == "stamps" else entry.category
    return next((name for name, folders in _CLASSES.items() if folder in folders), None) or (
        "mammal" if entry.category == "animal" and "mammal" in entry.wider else None
    )


def mask(scene: Scene) -> Image.Image:
    """Class number of every pixel, of the thing pasted last there; soft edges and half transparency do not count."""
    values = np.full(scene.image.size[::-1], GROUND, np.uint8)
    for thing in scene.things:
        if thing.opacity is None:
            continue
        opacity, (left, top) = np.asarray(thing.opacity), thing.place
        part = values[top : top + opacity.shape[0], left : left + opacity.shape[1]]
        part[opacity > CLEAR] = 0
        part[opacity >= 255 - CLEAR] = mask_class(thing)
    return Image.fromarray(values)


def mask_class(thing: Thing) -> int:
    """Number of a thing's kind in a mask; 0, not scored, for kinds that are no class."""
    kind = thing.entry.group_kind if thing.entry else ""
    return GROUND + 1 + KINDS.index(kind) if kind in KINDS else 0
