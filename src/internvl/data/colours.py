"""Named colours: what a cut-out's pixels are called, and what to paint a shape of that name with. Numbers only."""

from __future__ import annotations

from colorsys import hsv_to_rgb

import numpy as np
from jaxtyping import Float
from PIL import Image

NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
_HUES = (
    (12, "red"), (44, "orange"), (70, "yellow"), (158, "green"), (198, ""), (258, "blue"), (300, "purple"), (340,
    "pink"),
    (360, "red"),
)  # fmt: skip
"""Upper end of each name's hue in degrees; teal is called both blue and green. `_MARGIN` leaves the borders out."""
_MARGIN = 4
MEASURED = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
"""White and gray are left to painted shapes: line drawings and shades of metal have no clear name."""
SAFE_SHARE = 0.72
"""Share of the coloured area that must agree before a picture is called by one colour."""


def measure(picture: Image.Image) -> str | None:
    """The one colour of a cut-out, or None where people could disagree."""
    small = picture.convert("RGBA").resize((64, 64), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float32).reshape(-1, 4)
    rgb = pixels[pixels[:, 3] > 200][:, :3] / 255
    if len(rgb) < 200:
        return None
    names = name_pixels(rgb)
    dark = np.isin(names, (NAMES.index("black"),))
    if 0.02 < dark.mean() < 0.35:  # outlines of drawings do not name the thing
        names = names[~dark]
    counts = np.bincount(names[names >= 0], minlength=len(NAMES))
    best = int(counts.argmax())
    clear = counts[best] >= SAFE_SHARE * max(1, len(names)) and NAMES[best] in MEASURED
    return NAMES[best] if clear else None


def name_pixels(rgb: Float[np.ndarray, "pixels 3"]) -> np.ndarray:
    """Index into NAMES for each pixel, -1 near a border between names."""
    high, low = rgb.max(1), rgb.min(1)
    chroma = high - low
    saturation = np.where(high > 0, chroma / np.maximum(high, 1e-6), 0)
    hue = _hue(rgb, high, chroma)
    names = np.full(len(rgb), -1)
    start = 0
    for end, name in _HUES:
        inside = (hue >= start + _MARGIN * (start > 0)) & (hue < end - _MARGIN * (end < 360))
        names[inside] = NAMES.index(name) if name else -1
        start = end
    warm = (hue > 8) & (hue < 48)
    names[warm & (high < 0.62) & (high > 0.2) & (saturation > 0.35)] = NAMES.index("brown")
    names[warm & (high >= 0.62) & (high < 0.75)] = -1
    names[(hue > 295) & (hue < 345) & (high < 0.75)] = -1
    rosy = ((hue > 325) | (hue < 15)) & (high > 0.85) & (saturation < 0.55) & (saturation > 0.2)
    names[rosy] = NAMES.index("pink")
    names[((hue > 325) | (hue < 12)) & (saturation >= 0.55) & (saturation < 0.65) & (high > 0.85)] = -1
    names[warm & (saturation < 0.5) & (high > 0.6)] = -1  # skin, beige
    names[(saturation >= 0.1) & (saturation < 0.25)] = -1
    pale = saturation < 0.1
    for low_value, high_value, name in ((0.0, 0.2, "black"), (0.3, 0.78, "gray"), (0.9, 1.01, "white")):
        names[pale & (high >= low_value) & (high < high_value)] = NAMES.index(name)
    names[pale & (((high >= 0.2) & (high < 0.3)) | ((high >= 0.78) & (high < 0.9)))] = -1
    names[(~pale) & (high < 0.2)] = NAMES.index("black")
    names[(~pale) & (high >= 0.2) & (high < 0.32) & (names != NAMES.index("brown"))] = -1
    return names


def _hue(rgb: np.ndarray, high: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    red, green, blue = rgb.T
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(
        high == red,
        (green - blue) / safe % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return np.asarray(hue * 60 % 360)


_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
"""Rec. 601."""
_PAINT = {
    "red": ((214, 240), (12, 32), (12, 32)), "orange": ((240, 255), (128, 150), (0, 25)), "yellow": ((240, 255),
    (215, 235), (0, 50)),
    "green": ((10, 60), (130, 190), (20, 70)), "blue": ((15, 50), (50, 110), (190, 245)), "purple": ((110, 145), (20,
    50), (150, 200)),
    "pink": ((250, 255), (140, 175), (180, 205)), "brown": ((105, 135), (58, 76), (15, 35)), "black": ((0, 18),) * 3,
    "white": ((246, 255),) * 3, "gray": ((120, 145),) * 3,
}  # fmt: skip


def paint(name: str, generator: np.random.Generator) -> tuple[int, int, int]:
    """An RGB value that nobody would call by another name."""
    if name in ("black", "white", "gray"):
        value = int(generator.integers(*_PAINT[name][0]))
        return value, value, value
    red, green, blue = (int(generator.integers(low, high)) for low, high in _PAINT[name])
    return red, green, blue


_TRIES = 40
"""Draws of a colour until it bears the name that was asked for: pink is the rarest, one in eight."""
_CONTRASTS = (1.0, 0.6, 0.3)
"""Of a repainted picture, weaker where light and shade would bear other names."""


def repaint(picture: Image.Image, generator: np.random.Generator) -> tuple[Image.Image, str] | None:
    """A cut-out in a colour that is drawn, and what it is called; light, shade and outlines stay.

    None where, painted so, people could still disagree: a drawing of lines, say.
    """
    name = MEASURED[int(generator.integers(len(MEASURED)))]
    rgb = _drawn(name, generator)
    pixels = np.asarray(picture, np.float32)
    opaque = pixels[..., 3] > 200
    if rgb is None or not opaque.any():
        return None
    light = pixels[..., :3] @ _LUMINANCE
    light = np.clip(light / max(float(np.median(light[opaque])), 1.0), 0, 2)[..., None] - 1
    for contrast in _CONTRASTS:
        shade = contrast * light
        painted = rgb + np.where(shade < 0, rgb, 0.7 * (255 - rgb)) * shade
        image = Image.fromarray(np.concatenate([painted, pixels[..., 3:]], -1).round().astype(np.uint8), "RGBA")
        if measure(image) == name:
            return image, name
    return None


def _drawn(name: str, generator: np.random.Generator) -> Float[np.ndarray, "3"] | None:
    """Any colour of that name, dark ones and duller ones too."""
    low, high = ((0, 0, 0), (1, 0.3, 0.2)) if name == "black" else ((0, 0.35, 0.25), (1, 1, 1))
    for _ in range(_TRIES):
        rgb = np.array(hsv_to_rgb(*generator.uniform(low, high)), np.float32)
        if name_pixels(rgb[None])[0] == NAMES.index(name):
            return 255 * rgb
    return None


def luminance(rgb: np.ndarray | tuple[int, ...]) -> float:
    """Mean relative luminance, 0 to 255 (Rec. 601)."""
    return float((np.asarray(rgb, np.float32) @ _LUMINANCE).mean())
