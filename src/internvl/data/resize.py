"""Pillow's bicubic resize on several threads, as planes: the same bytes, since bands share nothing.

Pillow 12 resizes along rows, rounds, then along columns. Rows do not see each other in the first pass, columns not in
the second, so bands of them give what the whole gives. Pillow releases the interpreter lock meanwhile.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image

from internvl.data.threads import spread, threads_for

BICUBIC = Image.Resampling.BICUBIC
_PILLOW = int(PIL.__version__.split(".")[0])
Grid = UInt8[np.ndarray, "_ _ 3 side side"]
"""Rows and columns of square tiles of three planes, as they lie in the picture."""


def planes(image: Image.Image, *grids: Grid) -> None:
    """Write an RGB picture into each grid, resized to its size."""
    if image.mode != "RGB":
        raise ValueError(f"a picture of mode {image.mode}; make it RGB with open_image first")
    threads = threads_for(image.width * image.height + sum(grid.size // 3 for grid in grids))
    if threads == 1 or not _rows_come_first(image):
        spread(lambda grid: _write(image, grid), grids, threads)
        return
    bands = [image]
    if any(_width(grid) != image.width for grid in grids):
        edges = [round(band * image.height / threads) for band in range(threads + 1)]
        bands = [image.crop((0, top, image.width, bottom)) for top, bottom in pairwise(edges) if bottom > top]
    for grid in grids:
        if image.size == (_width(grid), _height(grid)):
            _write(image, grid)
        else:
            _resize(bands, grid, threads)


def _rows_come_first(image: Image.Image) -> bool:
    # Pillow 12 (Image.resize) begins with the columns of pictures a hundred times as tall as wide; 13 has another rule.
    return _PILLOW < 13 and image.height <= 100 * image.width


def _write(image: Image.Image, grid: Grid) -> None:
    rows, columns, _, side, _ = grid.shape
    for channel, plane in enumerate(image.resize((columns * side, rows * side), BICUBIC).split()):
        grid[:, :, channel] = np.asarray(plane).reshape(rows, side, columns, side).transpose(0, 2, 1, 3)


def _resize(bands: list[Image.Image], grid: Grid, threads: int) -> None:
    rows, columns, _, side, _ = grid.shape
    narrow = spread(lambda band: _along_rows(band, columns * side), bands, threads)
    # Bands of columns, each inside one column of tiles, and enough of them to keep the threads equally busy.
    pieces = 1 if columns % threads == 0 else 2 * threads
    edges = [round(part * side / pieces) for part in range(pieces + 1)]
    places = [(column, first, last) for column in range(columns) for first, last in pairwise(edges) if last > first]

    def write(place: tuple[int, int, int]) -> None:
        column, first, last = place
        band = _columns(narrow, column * side + first, last - first).resize((last - first, rows * side), BICUBIC)
        for channel, plane in enumerate(band.split()):
            grid[:, column, channel, :, first:last] = np.asarray(plane).reshape(rows, side, last - first)

    spread(write, places, threads)


def _along_rows(band: Image.Image, width: int) -> Image.Image:
    return band if band.width == width else band.resize((width, band.height), BICUBIC)


def _columns(bands: list[Image.Image], left: int, width: int) -> Image.Image:
    """These columns of the picture that the bands make up."""
    joined = Image.new("RGB", (width, sum(band.height for band in bands)), None)
    top = 0
    for band in bands:
        joined.paste(band, (-left, top))  # Pillow copies only what falls inside
        top += band.height
    return joined


def _width(grid: Grid) -> int:
    return int(grid.shape[1] * grid.shape[-1])


def _height(grid: Grid) -> int:
    return int(grid.shape[0] * grid.shape[-1])
