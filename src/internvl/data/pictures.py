"""What is asked about one collected picture: name in three languages, kind, colour, caption. Scenes: `questions.py`."""

from __future__ import annotations

import numpy as np
from PIL import Image

from internvl.data.asked import Asked, pick
from internvl.data.library import Entry, Library
from internvl.data.names import plural, with_article
from internvl.data.scenes import Box, lay_ground, region_text

_NAMING = ("What is this?", "What is shown in the picture?", "Name the object.", "What is in the picture?",
           "What do you see?",
           "What is it?", "what is this", "Name what you see.", "What object is this?", "What does the image show?",
           "Can you tell me what this is?", "Identify the object in the image.")  # fmt: skip
_FRENCH = ("Qu'est-ce que c'est ?", "Que voit-on sur l'image ?", "Qu'est-ce qu'on voit ?", "Nomme cet objet.")
_CHINESE = ("这是什么？", "图中是什么？", "图片里有什么？", "请说出图中的东西。")
_CAPTION = ("Describe the picture.", "Describe the image.", "Write a caption for the picture.",
            "Give a short caption.",
            "Please describe this image shortly.", "Caption this image.", "describe it",
            "What is the picture about?")  # fmt: skip
_LONG = ("Tell me about the picture.", "Describe the picture in detail.", "What do you know about this?",
         "Please describe the image in detail.", "Tell me something about what is shown.")  # fmt: skip
_KINDS = (
    "Is this an animal, a plant, food, a person or an object?",
    "What kind of thing is this: animal, plant, food, person or object?",
    "Animal, plant, food, person or object?",
    "Which category does it belong to: animal, plant, food, person, object?",
)
_CATEGORIES = ("animal", "plant", "food", "person", "object")
FULL = 0.95
"""Largest share of the canvas that a cut-out takes."""


def region_of(entry: Entry, box: Box) -> tuple[str, Box]:
    """The one thing there is."""
    return region_text(entry.colour, entry.name), box


def show(library: Library, entry: Entry, generator: np.random.Generator, plain: bool = False) -> Image.Image:
    """The picture as a question shows it: a photo nearly whole, a cut-out on some ground."""
    return show_placed(library, entry, generator, plain)[0]


def show_placed(
    library: Library, entry: Entry, generator: np.random.Generator, plain: bool = False
) -> tuple[Image.Image, Box]:
    """The picture, and where its object is on the 0..1000 grid: all of a photo."""
    if not entry.cutout:
        return _jitter(library.original(entry).convert("RGB"), generator, 0.0 if plain else 0.12), (0, 0, 1000, 1000)
    patch = library.original(entry).convert("RGBA")
    canvas = (
        Image.new("RGB", _square(generator), "white")
        if plain or generator.random() < 0.4
        else lay_ground(library, generator, True, 0.15)[0]
    )
    share = FULL if plain else generator.uniform(0.55, FULL)
    if not plain and generator.random() < 0.4:
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = share * min(canvas.width / patch.width, canvas.height / patch.height)
    patch = patch.resize(
        (max(1, int(patch.width * scale)), max(1, int(patch.height * scale))), Image.Resampling.BICUBIC
    )
    free = canvas.width - patch.width, canvas.height - patch.height
    place = (free[0] // 2, free[1] // 2) if plain else tuple(int(generator.integers(0, side + 1)) for side in free)
    canvas.paste(patch, (place[0], place[1]), patch)
    ends = place[0] + patch.width, place[1] + patch.height
    left, right = (round(1000 * x / canvas.width) for x in (place[0], ends[0]))
    top, bottom = (round(1000 * y / canvas.height) for y in (place[1], ends[1]))
    return canvas, (left, top, right, bottom)


def _square(generator: np.random.Generator) -> tuple[int, int]:
    side = int(generator.integers(216, 249))
    return side, side


def _jitter(photo: Image.Image, generator: np.random.Generator, most: float) -> Image.Image:
    cut = generator.uniform(0, most, 4) / 2 if most else np.zeros(4)
    box = (cut[0] * photo.width, cut[1] * photo.height, (1 - cut[2]) * photo.width, (1 - cut[3]) * photo.height)
    size = int(box[2] - box[0]), int(box[3] - box[1])
    limit = 256 if generator.random() < 0.7 else 512
    scale = min(1.0, limit / max(size))
    if limit == 256 and 0.6 < size[0] / size[1] < 1.6:  # one tile: near-square keeps its shape well enough
        side = int(generator.integers(216, 257))
        return photo.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return photo.resize((max(1, int(size[0] * scale)), max(1, int(size[1] * scale))), Image.Resampling.BICUBIC, box=box)


def conversation(library: Library, entry: Entry, generator: np.random.Generator) -> list[Asked]:
    """One to four different questions about a picture."""
    makers = [name for name in _ORDER if generator.random() < _SHARES[name]] or ["naming"]
    order = [makers[int(place)] for place in generator.permutation(len(makers))]
    asked = [_MAKERS[name](library, entry, generator) for name in order]
    kept = [made for made in asked if made is not None][:4]
    fallback = naming(library, entry, generator) or caption(library, entry, generator)
    return kept or ([fallback] if fallback else [])


def named(entry: Entry) -> str:
    """The answer to "what is this": with an article unless several things or a proper name."""
    many = entry.name.split(" ")[-1] != entry.head.split(" ")[-1] or not entry.single
    return entry.title.strip('“”".') if entry.proper else with_article(entry.name, plural=many)


def naming(library: Library, entry: Entry, generator: np.random.Generator) -> Asked | None:
    if not entry.name:
        return None
    return Asked("naming", pick(_NAMING, generator), named(entry), entry.accept)


def french(library: Library, entry: Entry, generator: np.random.Generator) -> Asked | None:
    return Asked("naming_fr", pick(_FRENCH, generator), entry.names["fr"]) if "fr" in entry.names else None


def chinese(library: Library, entry: Entry, generator: np.random.Generator) -> Asked | None:
    return Asked("naming_zh", pick(_CHINESE, generator), entry.names["zh"]) if "zh" in entry.names else None


def caption(library: Library, entry: Entry, generator: np.random.Generator) -> Asked | None:
    text = caption_of(entry)
    if not text:
        return None
    long = len(text.split()) > 14
    return Asked("captions", pick(_LONG if long else _CAPTION, generator), text)


def caption_of(entry: Entry) -> str:
    """What the package says in a sentence; else the name as one."""
    if entry.captions and entry.source in ("stamps", "gcompris"):
        return entry.captions[0]
    if not entry.name:
        return entry.captions[0] if entry.captions else ""
    text = named(entry)
    return text[0].upper() + text[1:] + "."


def category(library: Library, entry: Entry, generator: np.random.Generator) -> Asked | None:
    if entry.group_kind not in _CATEGORIES:
        return None
    text = pick(_KINDS, generator)
    return Asked("category", text, entry.group_kind)


def yesno(library: Library, entry: Entry, generator: np.random.Generator) -> Asked | None:
    if not entry.name or entry.proper:
        return None
    truth = generator.random() < 0.5
    head = entry.head
    if not truth:
        same = library.heads_of_kind.get(entry.group_kind, [])
        pool = same if generator.random() < 0.6 and len(same) > 5 else library.heads_of_kind["object"]
        head = pick(pool, generator)
        words = (*entry.accept, entry.name, *entry.keywords)
        other = library.cutouts.get(head)
        alike = entry.is_also(head) or any(head in word or word in head for word in words if len(word) > 2)
        if alike or entry.background or (other and other[0].is_also(entry.head)):
            return None
    one = with_article(head)
    text = pick((f"Is this {one}?", f"Is there {one} in the picture?", f"Does the picture show {one}?",
                 f"Can you see {one}?",
                 f"Is it {one}?", f"Are there any {plural(head)} in the image?", f"Does this look like {one}?",
                 f"is there {one} in the image?"), generator)  # fmt: skip
    return Asked("picture_yesno", text, "yes" if truth else "no")


def colour(library: Library, entry: Entry, generator: np.random.Generator) -> Asked | None:
    if not entry.colour or not entry.single:
        return None
    text = pick((f"What color is the {entry.head}?", f"What is the colour of the {entry.head}?", "Which color is it?",
                 f"What color is this {entry.head}?"), generator)  # fmt: skip
    return Asked("picture_colour", text, entry.colour)


_MAKERS = {
    "naming": naming,
    "yesno": yesno,
    "category": category,
    "colour": colour,
    "caption": caption,
    "fr": french,
    "zh": chinese,
}
_ORDER = tuple(_MAKERS)
_SHARES = {"naming": 0.75, "yesno": 0.4, "category": 0.15, "colour": 0.35, "caption": 0.4, "fr": 0.1, "zh": 0.1}
