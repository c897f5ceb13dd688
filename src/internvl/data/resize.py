"""Pillow's bicubic resize on several threads, as planes: the same bytes, since bands share nothing.

Pillow resizes along rows, rounds, then along columns. Rows do not see each other in the first pass, columns not in the
second, so bands of them give what the whole gives. Pillow releases the interpreter lock meanwhile.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from internvl.data.threads import spread, threads_for

BICUBIC = Image.Resampling.BICUBIC


def planes(image: Image.Image, width: int, height: int, out: UInt8[np.ndarray, "rows columns 3 side side"]) -> None:
    """Write an RGB picture, resized to `width` x `height`, into `out`: a grid of square tiles of three planes."""
    if image.mode != "RGB":
        raise ValueError(f"a picture of mode {image.mode}; make it RGB with open_image first")
    side = out.shape[-1]
    threads = threads_for(image.width * image.height + width * height)
    if threads == 1 or image.size == (width, height):
        whole = image if image.size == (width, height) else image.resize((width, height), BICUBIC)
        for channel, plane in enumerate(whole.split()):
            parts = np.asarray(plane).reshape(height // side, side, width // side, side)
            out[:, :, channel] = parts.transpose(0, 2, 1, 3)
        return
    bands = _rows_resized(image, width, threads)
    # Bands of columns, each inside one column of tiles, and enough of them to keep the threads equally busy.
    pieces = 1 if (width // side) % threads == 0 else 2 * threads
    edges = [
        (column, round(part * side / pieces), round((part + 1) * side / pieces))
        for column in range(width // side)
        for part in range(pieces)
    ]

    def write(edge: tuple[int, int, int]) -> None:
        column, first, last = edge
        if last > first:
            band = _columns(bands, column * side + first, column * side + last)
            for channel, plane in enumerate(band.resize((last - first, height), BICUBIC).split()):
                out[:, column, channel, :, first:last] = np.asarray(plane).reshape(-1, side, last - first)

    spread(write, edges, threads)


def _rows_resized(image: Image.Image, width: int, threads: int) -> list[Image.Image]:
    """Bands of rows, resized to `width`; the height stays."""
    if image.width == width:
        return [image]
    edges = [round(band * image.height / threads) for band in range(threads + 1)]
    bands = [(top, bottom) for top, bottom in pairwise(edges) if bottom > top]

    def resize(band: tuple[int, int]) -> Image.Image:
        return image.crop((0, band[0], image.width, band[1])).resize((width, band[1] - band[0]), BICUBIC)

    return spread(resize, bands, threads)


def _columns(bands: list[Image.Image], left: int, right: int) -> Image.Image:
    """These columns of the picture that the bands make up."""
    if len(bands) == 1:
        whole = bands[0]
        return whole if (left, right) == (0, whole.width) else whole.crop((left, 0, right, whole.height))
    joined = Image.new("RGB", (right - left, sum(band.height for band in bands)))
    top = 0
    for band in bands:
        joined.paste(band.crop((left, 0, right, band.height)), (0, top))
        top += band.height
    return joined
