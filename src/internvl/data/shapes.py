"""Painted shapes: what is asked for by colour and shape, and needs no picture of anybody's."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "rectangle", "star", "heart", "diamond", "hexagon", "cross", "ring")


def draw_shape(shape: str, rgb: tuple[int, int, int], generator: np.random.Generator, side: int = 160) -> Image.Image:
    """A filled shape on a transparent square, drawn large and shrunk for smooth edges."""
    big = 2 * side
    image = Image.new("RGBA", (big, big), (*rgb, 0))
    draw, ink = ImageDraw.Draw(image), (*rgb, 255)
    low, high, middle = 0.04 * big, 0.96 * big, big / 2
    if shape in ("circle", "ring"):
        draw.ellipse((low, low, high, high), outline=ink, width=big // 6, fill=ink if shape == "circle" else None)
    elif shape in ("square", "rectangle"):
        thin = 0 if shape == "square" else big * generator.uniform(0.18, 0.28)
        draw.rectangle((low, low + thin, high, high - thin), fill=ink)
    elif shape == "cross":
        third = big / 3
        draw.rectangle((low, third, high, 2 * third), fill=ink)
        draw.rectangle((third, low, 2 * third, high), fill=ink)
    else:
        draw.polygon([(middle + x * 0.46 * big, middle + y * 0.46 * big) for x, y in _outline(shape)], fill=ink)
    if shape == "rectangle" and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.ROTATE_90)
    if shape not in ("circle", "ring", "diamond", "square", "cross"):  # a turned square is a diamond
        image = image.rotate(generator.uniform(-14, 14), Image.Resampling.BILINEAR)
    return image.resize((side, side), Image.Resampling.BOX)


def _outline(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if shape == "heart":
        turns = np.linspace(0, 2 * np.pi, 60)
        height = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        return list(zip(np.sin(turns) ** 3, -(height + 2.5) / 16, strict=True))
    corners = 10 if shape == "star" else 6
    turns = np.arange(corners) * 2 * np.pi / corners
    reach = np.where(np.arange(corners) % 2 == 1, 0.42 if shape == "star" else 1.0, 1.0)
    return list(zip(np.sin(turns) * reach, -np.cos(turns) * reach, strict=True))
