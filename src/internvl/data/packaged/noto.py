"""Noto Color Emoji: a second style of the same drawings (Debian: fonts-noto-color-emoji)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from internvl.data.packaged.common import Found
from internvl.data.packaged.openmoji import named

STRIKE_PX = 109
"""The one size whose pictures the font holds."""


def read(fonts: Path, names: Path) -> Iterator[Found]:
    font = ImageFont.truetype(str(next(fonts.rglob("NotoColorEmoji.ttf"))), STRIKE_PX)
    empty = _draw(font, "\U0010fffd")
    for symbol, entry in named(names):
        if len(symbol) > 1:  # joined sequences need a text shaper
            continue
        data = _draw(font, symbol)
        if data and data != empty:
            yield Found(
                data=data,
                path=f"{ord(symbol):04X}.png",
                source="noto",
                kind="drawing",
                title=entry["en"],
                names={x: entry[x] for x in ("fr", "zh") if x in entry},
                category="emoji",
                series=f"emoji/{symbol}",
            )


def _draw(font: ImageFont.FreeTypeFont, symbol: str) -> bytes:
    image = Image.new("RGBA", (148, 148), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((4, 4), symbol, font=font, embedded_color=True)
    if image.getbbox() is None:
        return b""
    stream = io.BytesIO()
    image.crop(image.getbbox()).save(stream, "PNG")
    return stream.getvalue()
