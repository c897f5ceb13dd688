"""A picture as one square: the whole of it squashed, its middle, or a random part of it (training)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from internvl.data.resize import BICUBIC

RATIOS = (3 / 4, 4 / 3)
"""Width over height of a random part (torchvision's default, which the official transform keeps)."""
TRIES = 10


def squash(image: Image.Image, side: int) -> UInt8[Tensor, "3 side side"]:
    """The whole picture, bicubic, its ratio not kept (official transform of retrieval and captions)."""
    return _pixels(image, (0, 0, *image.size), side)


def middle(image: Image.Image, side: int, halve: Callable[[int], int] = lambda room: room // 2) -> Image.Image:
    """The middle square of `side` px, after the shorter side was resized to it, bicubic (CLIP's image processor).

    `halve` says how many of the pixels that are over lie on the left and above.
    """
    shorter = min(image.size)
    width, height = (side if edge == shorter else int(side * edge / shorter) for edge in image.size)
    left, top = halve(width - side), halve(height - side)
    return image.resize((width, height), BICUBIC).crop((left, top, left + side, top + side))


def random_crop(
    image: Image.Image, side: int, area: tuple[float, float], rng: np.random.Generator
) -> UInt8[Tensor, "3 side side"]:
    """A part of a share of the area drawn from `area`, of a ratio drawn from RATIOS, resized (RandomResizedCrop)."""
    return _pixels(image, random_box(image.size, area, rng), side)


def random_box(size: tuple[int, int], area: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels; where ten draws do not fit, the middle with the nearest allowed ratio."""
    width, height = size
    for _ in range(TRIES):
        pixels = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        wide, high = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    wide = min(width, max(1, round(height * RATIOS[1])))
    high = min(height, max(1, round(width / RATIOS[0])))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _pixels(image: Image.Image, box: tuple[int, int, int, int], side: int) -> Tensor:
    # Cut first: resizing with a box also reads what lies around it.
    part = image if box == (0, 0, *image.size) else image.crop(box)
    return torch.from_numpy(np.array(part.resize((side, side), BICUBIC))).permute(2, 0, 1).contiguous()
