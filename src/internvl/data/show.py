"""One sample as a model sees it: tiles in their grid, the prompt, what is learned and how much it weighs.

The sample is encode.py's own; here it is only laid out: on a terminal, as HTML, as a picture.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from internvl.data.encode import Encoder
from internvl.data.images import header_size
from internvl.data.records import Record
from internvl.data.tiling import choose_grid
from internvl.data.weighting import Weighting, weigh

if TYPE_CHECKING:
    from rich.console import Console

LEARNED, IMAGE, PLAIN = "#b7e4c7", "#cfe2ff", "#ffffff"
"""Grounds of learned text, of picture tokens, of the rest."""
_TILE_PX, _GAP_PX, _WIDTH_PX, _LINE_PX = 112, 4, 900, 19
_CELLS = 14
"""Columns of a terminal that a tile takes."""


class Span(NamedTuple):
    """A run of tokens of one sort."""

    text: str
    num_tokens: int
    weight: float
    """Of each of its tokens in the loss; 0 where nothing is learned."""
    is_image: bool = False


@dataclass(frozen=True)
class Shown:
    """A picture or a frame of the sample."""

    name: str
    grid: tuple[int, int]
    """Columns, rows."""
    tiles: UInt8[Tensor, "tiles 3 side side"]
    """Row by row; the thumbnail, when there is one, is last."""

    @property
    def has_thumbnail(self) -> bool:
        return len(self.tiles) > self.grid[0] * self.grid[1]

    def says(self) -> str:
        columns, rows = self.grid
        extra = " and a thumbnail" if self.has_thumbnail else ""
        return f"{self.name}: {columns} x {rows} tiles of {self.tiles.shape[-1]} px{extra}"


@dataclass(frozen=True)
class View:
    """A sample, ready to be shown."""

    source: str
    pictures: tuple[Shown, ...]
    spans: tuple[Span, ...]
    num_cut: int
    weighting: Weighting

    def says(self) -> str:
        tokens = sum(span.num_tokens for span in self.spans)
        learned = [span for span in self.spans if span.weight]
        count, weight = sum(span.num_tokens for span in learned), learned[0].weight if learned else 0.0
        cut = f"; {self.num_cut} more were cut" if self.num_cut else ""
        return (
            f"{tokens} tokens, {count} of them learned, each of weight {weight:.4g} ({self.weighting}); "
            f"{sum(len(shown.tiles) for shown in self.pictures)} tiles{cut}"
        )


def view(
    record: Record, encoder: Encoder, weighting: Weighting = "square", rng: np.random.Generator | None = None
) -> View:
    """The sample that training would make of a record."""
    sample = encoder.encode(record, rng)
    image_id = encoder.tokeniser.image_token_id
    ids, weights = sample.input_ids.tolist(), weigh(sample.labels, weighting).tolist()
    spans = []
    for (weight, is_image), run in groupby(zip(ids, weights, strict=True), lambda pair: (pair[1], pair[0] == image_id)):
        members = [token for token, _ in run]
        text = str(encoder.tokenizer.decode(members[:1] if is_image else members, skip_special_tokens=False))
        spans.append(Span(text, len(members), weight, is_image))
    counts = [span.num_tokens // encoder.config.tokens_per_tile for span in spans if span.is_image]
    parts = sample.tiles.split(counts) if counts else ()
    pictures = tuple(
        Shown(_name(record, number), _grid(record, encoder, number, len(tiles)), tiles)
        for number, tiles in enumerate(parts)
    )
    return View(record.source, pictures, tuple(spans), sample.num_cut, weighting)


def _name(record: Record, number: int) -> str:
    if record.video is not None:
        return f"frame {number + 1} of {record.video}"
    source = record.images[number]
    return source if isinstance(source, str) and not source.startswith("data:") else f"picture {number + 1}"


def _grid(record: Record, encoder: Encoder, number: int, count: int) -> tuple[int, int]:
    """The grid that was chosen for a picture of this many tiles."""
    config = encoder.config
    if count == 1:
        return 1, 1
    width, height = header_size(record.images[number])
    if config.pad_to_square:
        width = height = max(width, height)
    most = max(1, config.max_tiles // len(record.images))
    return choose_grid(width, height, min(config.min_tiles, most), most, config.tile_size)


def _pixels(tile: UInt8[Tensor, "3 side side"]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(tile.permute(1, 2, 0).numpy()))


def _written(span: Span) -> str:
    return f"{span.text} x {span.num_tokens}" if span.is_image else span.text


# terminal


def tell(seen: View, console: Console) -> None:
    """Tiles in half blocks of colour, the prompt with a ground behind what is learned; in [[...]] without colours."""
    from rich.text import Text

    console.print(f"{seen.source}: {seen.says()}", highlight=False, markup=False, soft_wrap=True)
    for shown in seen.pictures:
        console.print(shown.says(), highlight=False, markup=False, soft_wrap=True)
        for line in _blocks(shown) if console.color_system else ():
            console.print(line)
    text = Text()
    for span in seen.spans:
        style = "black on green3" if span.weight else "black on light_sky_blue1" if span.is_image else ""
        said = _visible(_written(span))
        text.append(f"[[{said}]]" if span.weight and not console.color_system else said, style)
    console.print(text, soft_wrap=True)


def _visible(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _blocks(shown: Shown) -> Iterator[object]:
    """Lines of upper half blocks: each character is two pixels, one above the other."""
    from rich.text import Text

    sheet = arrange(shown, _CELLS, 1)
    pixels = np.asarray(sheet)
    for row in range(0, sheet.height - 1, 2):
        line = Text()
        for above, below in zip(pixels[row].tolist(), pixels[row + 1].tolist(), strict=True):
            line.append("▀", f"rgb({','.join(map(str, above))}) on rgb({','.join(map(str, below))})")
        yield line


# pictures


def arrange(shown: Shown, tile_px: int = _TILE_PX, gap_px: int = _GAP_PX) -> Image.Image:
    """Tiles in their grid with gaps between them, the thumbnail to the right."""
    columns, rows = shown.grid
    step = tile_px + gap_px
    width = columns * step - gap_px + (3 * gap_px + tile_px if shown.has_thumbnail else 0)
    height = rows * step - gap_px
    sheet = Image.new("RGB", (width, height + height % 2), "white")
    for number, tile in enumerate(shown.tiles):
        small = _pixels(tile).resize((tile_px, tile_px), Image.Resampling.BOX)
        inside = number < columns * rows
        place = (number % columns * step, number // columns * step) if inside else (width - tile_px, 0)
        sheet.paste(small, place)
    return sheet


def to_picture(seen: View, width_px: int = _WIDTH_PX) -> Image.Image:
    """All of it as one picture; its font knows Latin letters only, HTML has them all."""
    font = ImageFont.load_default(13)
    sheets = [(shown.says(), arrange(shown)) for shown in seen.pictures]
    lines = list(_wrapped(seen, font, width_px - 20))
    height = 20 + _LINE_PX * 2 + sum(sheet.height + _LINE_PX + 10 for _, sheet in sheets) + _LINE_PX * (len(lines) + 2)
    page = Image.new("RGB", (max([width_px, *(sheet.width + 20 for _, sheet in sheets)]), height), "white")
    pen = ImageDraw.Draw(page)
    pen.text((10, 10), f"{seen.source}: {seen.says()}", fill="black", font=font)
    top = 10 + _LINE_PX * 2
    for said, sheet in sheets:
        pen.text((10, top), said, fill="#5b6675", font=font)
        page.paste(sheet, (10, top + _LINE_PX))
        top += sheet.height + _LINE_PX + 10
    for line in lines:
        left = 10.0
        for text, ground in line:
            width = font.getlength(text)
            pen.rectangle((left, top, left + width, top + _LINE_PX - 2), fill=ground)
            pen.text((left, top + 1), text, fill="black", font=font)
            left += width
        top += _LINE_PX
    left = 10.0
    weight = max((span.weight for span in seen.spans), default=0.0)
    for ground, said in (
        (LEARNED, f"learned, weight {weight:.4g} each"),
        (IMAGE, "tokens of tiles"),
        (PLAIN, "read only"),
    ):
        pen.rectangle((left, top + _LINE_PX // 2, left + 12, top + _LINE_PX // 2 + 12), fill=ground, outline="#5b6675")
        pen.text((left + 18, top + _LINE_PX // 2 - 1), said, fill="black", font=font)
        left += 30 + font.getlength(said)
    return page


def _wrapped(
    seen: View, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int
) -> Iterator[list[tuple[str, str]]]:
    """Lines of coloured pieces; broken where the text breaks, and where it is full."""
    line: list[tuple[str, str]] = []
    left = 0.0
    for span in seen.spans:
        ground = LEARNED if span.weight else IMAGE if span.is_image else PLAIN
        for number, part in enumerate(_visible(_written(span)).split("\n")):
            if number:
                yield line
                line, left = [], 0.0
            for word in _words(part):
                width = font.getlength(word)
                if left + width > width_px and line:
                    yield line
                    line, left = [], 0.0
                line.append((word, ground))
                left += width
    if line:
        yield line


def _words(text: str, longest: int = 60) -> Iterator[str]:
    """Words with the space behind them; none too long to fit."""
    for whole in re.findall(r"\S+\s*|\s+", text):
        yield from (whole[start : start + longest] for start in range(0, len(whole), longest))


# HTML

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #1c2430 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace }
.learned { background: #b7e4c7 } .image { background: #cfe2ff } figure { margin: 1rem 0 } figcaption { color: #5b6675 }
"""


def to_html(seen: View) -> str:
    """All of it as one page without scripts; the weight of a token shows under the pointer."""
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{_encoded(arrange(shown))}" alt="">'
        f"<figcaption>{escape(shown.says())}</figcaption></figure>"
        for shown in seen.pictures
    )
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(seen.source)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(seen.source)}</h1><p>{escape(seen.says())}</p>{figures}"
        f"<pre>{''.join(map(_marked, seen.spans))}</pre>"
        '<p><span class="learned">learned</span> <span class="image">tokens of tiles</span> read only</p></html>\n'
    )


def _marked(span: Span) -> str:
    kind = "learned" if span.weight else "image" if span.is_image else ""
    said = f"{span.num_tokens} tokens, weight {span.weight:.4g} each"
    return f'<span class="{kind}" title="{said}">{escape(_written(span))}</span>'


def _encoded(image: Image.Image) -> str:
    with io.BytesIO() as buffer:
        image.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()
