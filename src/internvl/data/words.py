"""Rendered words: text in many fonts on many grounds, to be read exactly as written. A word's hash decides its side."""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from internvl.data import colours
from internvl.data.asked import Asked, pick
from internvl.data.library import Library, Split
from internvl.data.scenes import Box, crop_photo

HELD_OUT_PER_MILLE = 120
SIZES_PX = (24, 90)
LINE_GAP_PX = 4
"""Pillow's own, between lines."""
CONTRAST = 95
"""Least distance in luminance between ink and ground, of 255."""
Sort = Literal["word", "number", "letters", "line"]
_SORTS: tuple[tuple[Sort, float], ...] = (("word", 0.7), ("number", 0.1), ("letters", 0.1), ("line", 0.1))
_QUESTIONS = ("What word is written here?", "Read the text.", "What does the text say?",
              "What is written in the picture?",
              "Read the word.", "Which word do you see?", "Please read the text in the image.", "What text is shown?",
              "what does it say?", "Transcribe the text.")  # fmt: skip


def side_of(text: str) -> Split:
    """Held out or not, by the text without case."""
    digest = hashlib.sha256(text.lower().encode()).hexdigest()
    return "heldout" if int(digest[:8], 16) % 1000 < HELD_OUT_PER_MILLE else "train"


@lru_cache(maxsize=4)
def vocabulary(folder: Path, split: Split) -> tuple[str, ...]:
    words = (folder / "words.txt").read_text().split()
    return tuple(word for word in words if side_of(word) == split)


@lru_cache(maxsize=4)
def font_files(folder: Path) -> tuple[str, ...]:
    return tuple(str(path) for path in sorted((folder / "fonts").glob("*.ttf")))


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def text_for(folder: Path, split: Split, generator: np.random.Generator, sort: Sort | None = None) -> str:
    sorts, shares = zip(*_SORTS, strict=True)
    sort = sort or sorts[int(generator.choice(len(sorts), p=shares))]
    if sort == "word":
        return _cased(pick(vocabulary(folder, split), generator), generator)
    if sort == "line":
        case = int(generator.integers(3))
        words = [pick(vocabulary(folder, split), generator) for _ in range(int(generator.integers(2, 4)))]
        return " ".join(words) if case else " ".join(words).upper()
    alphabet = (
        string.digits
        if sort == "number"
        else (string.ascii_uppercase if generator.random() < 0.5 else string.ascii_lowercase)
    )
    while True:  # a side of the split holds 12 or 88 percent of all strings
        length = int(generator.integers(2, 6))
        text = "".join(pick(list(alphabet), generator) for _ in range(length))
        if side_of(text) == split:
            return text


def _cased(word: str, generator: np.random.Generator) -> str:
    return (word, word, word.capitalize(), word.upper())[int(generator.integers(4))]


def render(library: Library, text: str, generator: np.random.Generator) -> Image.Image:
    """The text once, whole, legible."""
    return render_placed(library, text, generator)[0]


def render_placed(
    library: Library, text: str, generator: np.random.Generator
) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """The text once, whole, legible; and where each letter is on the 0..1000 grid."""
    font = _font(pick(font_files(library.folder), generator), int(generator.integers(*SIZES_PX)))
    lines = text.replace(" ", "\n") if generator.random() < 0.5 else text
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), lines, font=font)
    width, height = int(right - left), int(bottom - top)
    size = _canvas(width, height, generator)
    ground = _ground(library, size, generator)
    layer = Image.new("L", (width + 8, height + 8))
    ImageDraw.Draw(layer).multiline_text((4 - left, 4 - top), lines, fill=255, font=font, align="center")
    letters = _letters(lines, font, (float(4 - left), float(4 - top)))
    if generator.random() < 0.4:
        angle, before = generator.uniform(-9, 9), layer.size
        layer = layer.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        letters = [(letter, _turned(box, angle, before, layer.size)) for letter, box in letters]
    scale = min(1.0, 0.96 * size[0] / layer.width, 0.96 * size[1] / layer.height)
    if scale < 1:
        layer = layer.resize(
            (max(1, int(layer.width * scale)), max(1, int(layer.height * scale))), Image.Resampling.LANCZOS
        )
    place = (
        int(generator.integers(0, size[0] - layer.width + 1)),
        int(generator.integers(0, size[1] - layer.height + 1)),
    )
    _write(ground, layer, place, generator)
    return ground, [
        (letter, _on_grid([(place[axis % 2] + edge * scale) / size[axis % 2] for axis, edge in enumerate(box)]))
        for letter, box in letters
    ]


def _letters(
    lines: str, font: ImageFont.FreeTypeFont, origin: tuple[float, float]
) -> list[tuple[str, tuple[float, ...]]]:
    """Letters with left, top, right, bottom in pixels, as Pillow sets centred lines from `origin`."""
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    step = draw.textbbox((0, 0), "A", font=font)[3] + LINE_GAP_PX
    texts = lines.split("\n")
    widths = [font.getlength(text) for text in texts]
    found: list[tuple[str, tuple[float, ...]]] = []
    for number, (text, width) in enumerate(zip(texts, widths, strict=True)):
        across = origin[0] + (max(widths) - width) / 2
        down = origin[1] + number * step
        _, top, _, bottom = font.getbbox(text)
        edges = [across + font.getlength(text[:end]) for end in range(len(text) + 1)]
        found += [
            (letter, (a, down + top, b, down + bottom))
            for letter, (a, b) in zip(text, pairwise(edges), strict=True)
            if letter != " "
        ]
    return found


def _turned(box: tuple[float, ...], angle: float, before: tuple[int, int], after: tuple[int, int]) -> tuple[float, ...]:
    """The box with its centre turned as the picture is, by degrees against the clock; it stays upright."""
    left, top, right, bottom = box
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = (left + right - before[0]) / 2, (top + bottom - before[1]) / 2
    across, down = x * cos + y * sin + after[0] / 2, y * cos - x * sin + after[1] / 2
    wide, high = (right - left) / 2, (bottom - top) / 2
    return across - wide, down - high, across + wide, down + high


def _on_grid(box: Sequence[float]) -> Box:
    left, top, right, bottom = (min(1000, max(0, round(1000 * edge))) for edge in box)
    return left, top, right, bottom


def _canvas(width: int, height: int, generator: np.random.Generator) -> tuple[int, int]:
    """Mostly one near-square tile, sometimes a strip as wide as the text."""
    if generator.random() < 0.75:
        side = int(generator.integers(200, 257))
        return side, max(180, min(256, round(side * generator.uniform(0.92, 1.1))))
    wide = int(width * generator.uniform(1.1, 1.5)) + 20
    return max(160, min(672, wide)), max(120, min(448, int(height * generator.uniform(1.4, 3)) + 20))


def _ground(library: Library, size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    draw = generator.random()
    if draw < 0.2 and library.backgrounds:
        entry = library.backgrounds[int(generator.integers(len(library.backgrounds)))]
        return crop_photo(library.picture(entry), size, generator)
    if draw < 0.45:
        return Image.new("RGB", size, "white")
    if draw < 0.75:
        return Image.new("RGB", size, colours.paint(pick(colours.NAMES, generator), generator))
    base = generator.integers(0, 256, 3)
    ends = np.clip(base + generator.integers(-50, 51, (2, 2, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(ends).resize(size, Image.Resampling.BICUBIC)


def _write(ground: Image.Image, layer: Image.Image, place: tuple[int, int], generator: np.random.Generator) -> None:
    behind = np.asarray(ground.crop((*place, place[0] + layer.width, place[1] + layer.height)).resize((16, 8)))
    level = colours.luminance(behind)
    busy = float(np.asarray(behind, np.float32).mean(2).std()) > 24
    for _ in range(20):
        ink = tuple(int(v) for v in generator.integers(0, 256, 3))
        if abs(colours.luminance(ink) - level) >= CONTRAST:
            break
    else:
        ink = (0, 0, 0) if level > 127 else (255, 255, 255)
    if busy or generator.random() < 0.08:  # a plate behind the text, as on a sign
        plate = (255, 255, 255) if colours.luminance(ink) < 128 else (0, 0, 0)
        if abs(colours.luminance(ink) - colours.luminance(plate)) < CONTRAST:
            ink = (0, 0, 0) if plate == (255, 255, 255) else (255, 255, 255)
        ground.paste(plate, (*place, place[0] + layer.width, place[1] + layer.height))
    ground.paste(ink, place, layer)


def ask(text: str, generator: np.random.Generator) -> Asked:
    return Asked("words", pick(_QUESTIONS, generator), text, (text,))
