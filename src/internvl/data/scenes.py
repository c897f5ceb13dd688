"""Composed scenes: real cut-outs and painted shapes on photos or plain grounds, with exact boxes, colours and counts.

What is asked about a scene is `questions.py`. Everything follows from the generator that is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from PIL import Image

from internvl.data import colours
from internvl.data.library import Entry, Library
from internvl.data.shapes import SHAPES, draw_shape

Box = tuple[int, int, int, int]
Kind = Literal["mixed", "count", "shapes", "colour"]
KINDS: tuple[tuple[Kind, float], ...] = (("mixed", 0.40), ("count", 0.26), ("shapes", 0.22), ("colour", 0.12))
_LARGEST = {1: 0.85, 2: 0.55, 3: 0.46, 4: 0.42, 5: 0.38, 6: 0.34, 7: 0.32, 8: 0.3}
"""Longest side of an object as a share of the canvas, by number of objects."""
_SMALLEST = 0.2
MAX_HIDDEN = 0.12
"""Share of an object's box that another may cover: at least 88 % stay visible."""
ALPHA = 100
"""Opacity from which a pixel belongs to the object's box."""


@dataclass
class Thing:
    noun: str
    """How a question calls it: unique in the scene unless several are alike."""
    name: str
    box: Box
    """Pixels: left, top, right, bottom, the last two exclusive."""
    colour: str | None
    entry: Entry | None = None
    """None for a painted shape."""
    opacity: Image.Image | None = None
    """Of the picture as it was pasted, 0..255, with its left upper corner at `place`; None before."""
    place: tuple[int, int] = (0, 0)

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def region_text(colour: str | None, name: str) -> str:
    """What a token that lies in a thing says: its colour where that is clear, and its name."""
    return f"{colour or ''} {name}".strip()


@dataclass
class Scene:
    image: Image.Image
    things: list[Thing]
    kind: Kind
    ground: str
    """photo, texture, or the colour name of a plain ground."""
    pictures: list[str] = field(default_factory=list)
    """Ids of the cut-outs and of the background."""

    def box_1000(self, thing: Thing) -> Box:
        """On the 0..1000 grid of the official box format."""
        width, height = self.image.size
        left, top, right, bottom = thing.box
        return (
            round(1000 * left / width), round(1000 * top / height),
            round(1000 * right / width), round(1000 * bottom / height),
        )  # fmt: skip

    def regions(self) -> list[tuple[str, Box]]:
        """What is where, on the 0..1000 grid."""
        return [(region_text(thing.colour, thing.name), self.box_1000(thing)) for thing in self.things]

    def groups(self) -> dict[str, list[Thing]]:
        found: dict[str, list[Thing]] = {}
        for thing in self.things:
            found.setdefault(thing.noun, []).append(thing)
        return found


def compose(
    library: Library,
    generator: np.random.Generator,
    kind: Kind | None = None,
    small: bool | None = None,
    most: int | None = None,
    repainted: float = 0.0,
) -> Scene:
    """One scene of at most `most` things; `kind` and size are drawn where not given.

    `repainted` is the share of cut-outs, but for crowds, that stand there in a colour that is drawn.
    """
    names, shares = zip(*KINDS, strict=True)
    kind = kind or names[int(generator.choice(len(names), p=shares))]
    canvas, ground, pictures = lay_ground(library, generator, small, 0.25 if kind == "shapes" else 0.5)
    scene = Scene(canvas, [], kind, ground, pictures)
    for patch, thing in _cast(library, generator, kind, canvas, repainted)[:most]:
        _place(scene, patch, thing, generator)
    return scene


def _size(generator: np.random.Generator, small: bool | None) -> tuple[int, int]:
    if small if small is not None else generator.random() < 0.93:
        side = int(generator.integers(200, 257))
        return side, max(180, min(256, round(side * generator.uniform(0.92, 1.1))))
    longest, aspect = int(generator.integers(320, 673)), float(np.exp(generator.uniform(-0.75, 0.75)))
    return (longest, round(longest / aspect)) if aspect > 1 else (round(longest * aspect), longest)


def lay_ground(
    library: Library, generator: np.random.Generator, small: bool | None, photos: float
) -> tuple[Image.Image, str, list[str]]:
    size = _size(generator, small)
    draw = generator.random()
    if draw < photos and library.backgrounds:
        entry = library.backgrounds[int(generator.integers(len(library.backgrounds)))]
        return crop_photo(library.picture(entry), size, generator), "photo", [entry.id]
    if draw < 0.8:
        name = colours.NAMES[int(generator.integers(len(colours.NAMES)))] if generator.random() < 0.6 else "white"
        return Image.new("RGB", size, colours.paint(name, generator)), name, []
    ends = generator.integers(0, 256, (2, 2, 3) if draw < 0.92 else (6, 6, 3), dtype=np.uint8)
    if draw >= 0.92:
        ends = (ends // 4 + generator.integers(40, 190)).astype(np.uint8)
    return Image.fromarray(ends).resize(size, Image.Resampling.BICUBIC), "texture", []


def crop_photo(photo: Image.Image, size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    """A part of a photo at the wanted size, mirrored and brighter or darker now and then."""
    share = generator.uniform(0.5, 1.0)
    scale = share * min(photo.width / size[0], photo.height / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = generator.uniform(0, photo.width - width), generator.uniform(0, photo.height - height)
    crop = photo.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height), reducing_gap=1.5)
    if generator.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = generator.uniform(0.7, 1.15)
    return crop.point([min(255, int(v * gain)) for v in range(256)] * 3)


def _cast(
    library: Library, generator: np.random.Generator, kind: Kind, canvas: Image.Image, repainted: float
) -> list[tuple[Image.Image, Thing]]:
    """What stands in the scene, with the picture of each, unplaced."""
    if kind == "shapes":
        return _shapes(generator, canvas)
    if kind == "count":
        return _crowd(library, generator)
    number = int(generator.choice([1, 2, 3, 4, 5, 6], p=[0.16, 0.34, 0.24, 0.14, 0.08, 0.04]))
    coloured = kind == "colour" and not repainted
    heads = _different(library, generator, number, library.coloured if coloured else None)
    cast = []
    for head in heads:
        found = [entry for entry in library.cutouts[head] if entry.colour or not coloured]
        patch, thing = _take(library, found[int(generator.integers(len(found)))], generator)
        cast.append(_repaint(patch, thing, generator, repainted) if repainted else (patch, thing))
    return cast


def _repaint(
    patch: Image.Image, thing: Thing, generator: np.random.Generator, share: float
) -> tuple[Image.Image, Thing]:
    """Its name becomes the bare noun: the old one may tell of the old colour."""
    painted = colours.repaint(patch, generator) if generator.random() < share else None
    return (patch, thing) if painted is None else (painted[0], replace(thing, name=thing.noun, colour=painted[1]))


def _different(library: Library, generator: np.random.Generator, number: int, pool: list[str] | None) -> list[str]:
    """Heads of which none is another's synonym or wider term."""
    chosen: list[str] = []
    for _ in range(6 * number):
        if pool:
            head = pool[int(generator.integers(len(pool)))]
        else:
            head = library.heads[int(generator.choice(len(library.heads), p=library.head_shares))]
        entry = library.cutouts[head][0]
        alike = any(entry.is_also(other) or library.cutouts[other][0].is_also(head) for other in chosen)
        if not alike and head not in chosen:
            chosen.append(head)
        if len(chosen) == number:
            break
    return chosen


def _crowd(library: Library, generator: np.random.Generator) -> list[tuple[Image.Image, Thing]]:
    """One kind one to five times, and sometimes others beside it."""
    number = int(generator.choice([1, 2, 3, 4, 5], p=[0.14, 0.2, 0.22, 0.22, 0.22]))
    others = int(generator.choice([0, 1, 2, 3], p=[0.45, 0.3, 0.17, 0.08]))
    heads = _different(library, generator, 1 + others, None)
    found = library.cutouts[heads[0]]
    same = found[int(generator.integers(len(found)))]
    cast = []
    vary = generator.random() < 0.25
    for _ in range(number):
        entry = found[int(generator.integers(len(found)))] if vary else same
        patch, thing = _take(library, entry, generator)
        cast.append((patch, Thing(heads[0], thing.name if not vary else heads[0], thing.box, thing.colour, entry)))
    cast += [_take(library, library.cutouts[head][0], generator) for head in heads[1:]]
    second = generator.random() < 0.3 and len(heads) > 1  # a second kind that repeats
    return cast + [
        _take(library, library.cutouts[heads[1]][0], generator) for _ in range(int(generator.integers(1, 3)) * second)
    ]


def _take(library: Library, entry: Entry, generator: np.random.Generator) -> tuple[Image.Image, Thing]:
    patch = library.picture(entry)
    if generator.random() < 0.4:
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return patch, Thing(entry.head, entry.name, (0, 0, 0, 0), entry.colour, entry)


def _shapes(generator: np.random.Generator, canvas: Image.Image) -> list[tuple[Image.Image, Thing]]:
    number = int(generator.choice([1, 2, 3, 4, 5, 6], p=[0.14, 0.26, 0.24, 0.18, 0.12, 0.06]))
    ground = np.asarray(canvas.resize((8, 8), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    alike = generator.random() < 0.35
    shape, seen = _pick(SHAPES, generator), set()
    cast: list[tuple[Image.Image, Thing]] = []
    for _ in range(4 * number):
        if len(cast) == number:
            break
        shape = shape if alike and generator.random() < 0.75 else _pick(SHAPES, generator)
        colour = _pick(colours.NAMES, generator)
        rgb = colours.paint(colour, generator)
        if np.linalg.norm(ground - np.array(rgb), axis=1).min() < 70 or (not alike and (colour, shape) in seen):
            continue
        seen.add((colour, shape))
        cast.append((draw_shape(shape, rgb, generator), Thing(f"{colour} {shape}", shape, (0, 0, 0, 0), colour)))
    return cast


def _pick(options: tuple[str, ...], generator: np.random.Generator) -> str:
    return options[int(generator.integers(len(options)))]


def _place(scene: Scene, patch: Image.Image, thing: Thing, generator: np.random.Generator, tries: int = 24) -> None:
    """Paste at a free place; a thing that finds none is left out."""
    width, height = scene.image.size
    expected = max(len(scene.things) + 1, min(8, 2 + len(scene.things)))
    share = generator.uniform(_SMALLEST, _LARGEST[min(8, expected)])
    if not scene.things and generator.random() < 0.5:
        share = generator.uniform(_SMALLEST, 0.42)
    for attempt in range(tries):
        side = max(20.0, share * min(width, height) * 0.93 ** (attempt // 3))
        scale = side / max(patch.size)
        size = max(8, round(patch.width * scale)), max(8, round(patch.height * scale))
        if size[0] >= width or size[1] >= height:
            continue
        left, top = int(generator.integers(0, width - size[0] + 1)), int(generator.integers(0, height - size[1] + 1))
        if not _free((left, top, left + size[0], top + size[1]), scene.things):
            continue
        small = patch.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        box = small.getchannel("A").point([0] * ALPHA + [255] * (256 - ALPHA)).getbbox()
        if box is None:
            return
        if not _stands_out(small, scene.image.crop((left, top, left + size[0], top + size[1]))):
            continue
        scene.image.paste(small, (left, top), small)
        thing.opacity, thing.place = small.getchannel("A"), (left, top)
        thing.box = (left + box[0], top + box[1], left + box[2], top + box[3])
        scene.things.append(thing)
        if thing.entry:
            scene.pictures.append(thing.entry.id)
        return


def _stands_out(patch: Image.Image, behind: Image.Image, least: float = 38) -> bool:
    """Whether patch and ground differ in colour, taken over a coarse grid: no dark mug on a dark ground."""
    coarse = np.asarray(patch.resize((6, 6), Image.Resampling.BOX), np.float32)
    ground = np.asarray(behind.resize((6, 6), Image.Resampling.BOX), np.float32)
    opaque = coarse[..., 3] / 255
    distance = np.linalg.norm(coarse[..., :3] - ground, axis=-1)
    return float((distance * opaque).sum() / max(opaque.sum(), 1e-3)) >= least


def _free(box: Box, others: list[Thing]) -> bool:
    for other in others:
        width = min(box[2], other.box[2]) - max(box[0], other.box[0])
        height = min(box[3], other.box[3]) - max(box[1], other.box[1])
        if width <= 0 or height <= 0:
            continue
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other.box)]
        if width * height > MAX_HIDDEN * min(areas):
            return False
    return True
