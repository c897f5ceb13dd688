"""What users hand to a dual model, checked before it is looked at: each error says value, limit and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from internvl.data.images import Source

PICTURES = (str, bytes, Path, Image.Image, np.ndarray)


def listed_texts(texts: str | Sequence[str]) -> list[str]:
    """One or several texts as a list; an empty one is a text. ValueError for none, and for what is no text."""
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not rows:
        raise ValueError("no text was given; give at least one")
    for place, text in enumerate(rows):
        if not isinstance(text, str):
            raise ValueError(f"text {place} is {brief(text)}; give strings, or one tensor of ids")
    return rows


def listed_pictures(images: Source | Sequence[Source]) -> list[Source]:
    """One or several pictures as a list. ValueError for none, and for what is no picture."""
    if isinstance(images, PICTURES):
        return [images]
    if not isinstance(images, Sequence):
        raise ValueError(f"pictures are {brief(images)}; give a path, a PIL image, an array, or a list of them")
    if not images:
        raise ValueError("no picture was given; give at least one")
    for place, image in enumerate(images):
        if not isinstance(image, PICTURES):
            raise ValueError(f"picture {place} is {brief(image)}; give a path, bytes, a PIL image or an array of uint8")
    return list(images)  # type: ignore[arg-type]  # bytes are a picture: they went before


def check_pixels(pixels: Tensor) -> Tensor:
    """Normalised pixels of several pictures, as they are."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise ValueError(
            f"pixels of shape {tuple(pixels.shape)}; give (pictures, 3, height, width), at least one picture: of one, "
            "pixels[None]"
        )
    if not pixels.is_floating_point():
        raise ValueError(f"pixels of {pixels.dtype}; they are normalised floats: give arrays or PIL images instead")
    return pixels


def check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Ids of several texts, as they are."""
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} and {ids.dtype}; give whole numbers (texts, length): of one text, "
            "ids[None]"
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"ids run from {least} to {most}, but the model knows 0 to {vocab_size - 1}; use its own tokenizer, and 0 "
            "for padding"
        )
    return ids


def check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch {batch}; at least 1 goes at a time")


def brief(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
